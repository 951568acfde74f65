"""Rewrap paragraphs of markdown cells in py:percent scripts whose lines exceed 100 characters."""
import re,sys,textwrap
for p in sys.argv[1:]:
    lines=open(p).read().split('\n'); out=[]; i=0; md=False; fence=False; math=False
    def flush(par):
        if not par: return
        if any(len(l)>100 for l in par):
            first=par[0][2:]
            m=re.match(r'(- |\d+\. |> )?',first); lead=m.group(0) or ''
            ind=' '*len(lead) if lead!='> ' else '> '
            items=[]
            text=[]
            for l in par:
                t=l[2:]
                if re.match(r'- ',t) and text: items.append(' '.join(text)); text=[t]
                else: text.append(t.strip() if text else t)
            items.append(' '.join(text))
            for it in items:
                it=re.sub(r'^> ','',it) if lead=='> ' else it
                it=it.replace(' > ',' ') if lead=='> ' else it
                w=textwrap.wrap(it,width=98,initial_indent=('> ' if lead=='> ' else ''),subsequent_indent=ind,break_long_words=False,break_on_hyphens=False)
                out.extend('# '+x for x in w)
        else: out.extend(par)
    par=[]
    for l in lines:
        if l.startswith('# %%'):
            flush(par); par=[]
            md='[markdown]' in l; fence=math=False; out.append(l); continue
        if not md: out.append(l); continue
        t=l[2:] if l.startswith('# ') else ''
        if re.match(r'(```|~~~|:::)',t) and not (t.startswith('````{exercise') or t=='````'):
            flush(par); par=[]; fence=not fence; out.append(l); continue
        if fence: out.append(l); continue
        if t.startswith('$$') or math or t.rstrip().endswith('$$') or re.search(r'\$\$ \(',t):
            flush(par); par=[]
            n=t.count('$$'); 
            if n%2==1: math=not math
            out.append(l); continue
        if l in ('#','') or t.startswith(('|','#','````',':')) or not l.startswith('# '):
            flush(par); par=[]; out.append(l); continue
        par.append(l)
    flush(par)
    open(p,'w').write('\n'.join(out))
