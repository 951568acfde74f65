import sys,re
# minutes of the main line: words/200 + code lines/8*... + formulas
import jupytext
for f in sys.argv[1:]:
    nb=jupytext.read(f); words=lines=eqs=0; inroom=False
    for c in nb.cells:
        s=c.source
        if c.cell_type=="markdown":
            if re.search(r"^## Exercises",s,re.M): break
            tags=c.metadata.get("tags",[])
            if "engine" in tags: continue
            t=re.sub(r"^\|.*$"," ",s,flags=re.M)
            eqs+=len(re.findall(r"\$\$",t))//2+len(re.findall(r"```\{math\}",t))
            t=re.sub(r"\$\$.*?\$\$"," ",t,flags=re.S)
            words+=len(re.findall(r"[A-Za-z][A-Za-z'’-]*",t))
        else:
            if {"engine","remove-cell"}&set(c.metadata.get("tags",[])): continue
            lines+=sum(1 for l in s.splitlines() if l.strip())
    print(f, "words",words,"lines",lines,"eqs",eqs,"min≈",round(words/200+lines/12+eqs))
