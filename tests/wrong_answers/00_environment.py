# Wrong answers to the exercises of chapter 00, and what their checks must say of them.

# %% exercise="ex-environment-stream" says="a global generator was moved"
# The global generator, seeded for all the program
def private_normals(n, seed):
    torch.manual_seed(seed)
    return torch.randn(n)


# %% exercise="ex-environment-stream" says="a global generator was moved"
# Another library's global generator
def private_normals(n, seed):
    np.random.seed(seed)
    return torch.from_numpy(np.random.randn(n)).float()


# %% exercise="ex-environment-stream" says="another seed must give other numbers"
# A generator of its own, and the seed forgotten
def private_normals(n, seed):
    return torch.randn(n, generator=torch.Generator())


# %% exercise="ex-environment-stream" says="the same seed must give the same numbers"
# Seeded from the clock of the system
def private_normals(n, seed):
    generator = torch.Generator()
    generator.seed()
    return torch.randn(n, generator=generator)


# %% exercise="ex-environment-stream" says="the mean of standard normal numbers is 0"
# Uniform numbers
def private_normals(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# %% exercise="ex-environment-stream" says="these are not normal"
# Uniform numbers with the right mean and deviation
def private_normals(n, seed):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return (uniform - 0.5) * 12**0.5


# %% exercise="ex-environment-hash" says="depends on the process"
# The hash that is at hand
def stable_hash(text):
    return hash(text) % 2**64


# %% exercise="ex-environment-hash" says="the most significant byte is first"
# The bytes in the processor's order
def stable_hash(text):
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


# %% exercise="ex-environment-hash" says="has fewer"
# Eight hexadecimal digits are four bytes
def stable_hash(text):
    import hashlib

    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


# %% exercise="ex-environment-hash" says="eight bytes, no more"
# All of the digest
def stable_hash(text):
    import hashlib

    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


# %% exercise="ex-environment-hash" says="SHA-256 of nothing begins"
# The last eight bytes
def stable_hash(text):
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[-8:], "big")


# %% exercise="ex-environment-hash" says="in UTF-8"
# Latin-1, which has a byte for each of these letters
def stable_hash(text):
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode("latin-1")).digest()[:8], "big")


# %% exercise="ex-environment-hash" says="a whole number"
# The digits, not the number
def stable_hash(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


# %% exercise="ex-environment-kahan" says="what is cut off is kept"
# One by one, without a correction
def kahan_sum(numbers):
    total = np.float32(0)
    for number in numbers.astype(np.float32):
        total = total + number
    return total


# %% exercise="ex-environment-kahan" says="32 bits throughout"
# More bits instead of a correction
def kahan_sum(numbers):
    return np.float32(numbers.sum(dtype=np.float64))


# %% exercise="ex-environment-kahan" says="32 bits"
# Python's own numbers, which have 64 bits
def kahan_sum(numbers):
    total = correction = 0.0
    for number in numbers.tolist():
        corrected = number - correction
        new_total = total + corrected
        correction = (new_total - total) - corrected
        total = new_total
    return total


# %% exercise="ex-environment-kahan" says="what is cut off is kept"
# The correction with the wrong sign
def kahan_sum(numbers):
    total = correction = np.float32(0)
    for number in numbers.astype(np.float32):
        corrected = number + correction
        new_total = total + corrected
        correction = (new_total - total) - corrected
        total = new_total
    return total


# %% exercise="ex-environment-kahan" says="what was cut off before"
# The correction forgets what was already corrected: x in the place of y
def kahan_sum(numbers):
    total = correction = np.float32(0)
    for number in numbers.astype(np.float32):
        new_total = total + (number - correction)
        correction = (new_total - total) - number
        total = new_total
    return total


# %% exercise="ex-environment-kahan" says="what is cut off is kept"
# Blocks, as in NumPy: accurate, and another method
def kahan_sum(numbers):
    return numbers.sum(dtype=np.float32)
