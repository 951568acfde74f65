import sys,json
nb=json.load(open(sys.argv[1]))
skip=False
for c in nb['cells']:
    t=c['metadata'].get('tags',[]); s=''.join(c['source'])
    if 'engine' in t or 'remove-cell' in t: 
        print('   [engine]', s.split('\n')[0][:80]); continue
    if c['cell_type']=='markdown': print(s)
    else:
        print('```'); print(s); print('```')
        for o in c.get('outputs',[]):
            if 'text' in o: print('>>>',''.join(o['text']))
            elif 'data' in o: print('>>>', [k for k in o['data']], ''.join(o['data'].get('text/plain',''))[:200])
    print()
