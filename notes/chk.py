import sys
from book import ROOT
import checks
want = sys.argv[1:]
n = 0
for check in checks.CHECKS:
    for line in checks.complaints(check, ROOT):
        if not want or any(w in line for w in want):
            n += 1
            print(f"{check.__name__}: {line}"[:400])
print(n, "complaints")
