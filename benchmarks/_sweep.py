import os, sys, torch, triton, math
sys.argv=[sys.argv[0]]
from benchmarks.gpu_correctness import *
from lowering.triton import linear
from lowering.triton.linear import Tile
op=all_ops()["linear_w8a8"]; f=op.choose("triton",(torch.zeros(1,64,dtype=torch.int8),None,None,None,None,None,None,None,None,torch.bfloat16)).function
W={}
def weights(n,k):
    if (n,k) not in W:
        W.clear()
        W[n,k]=[numerics.quantize_weight(random_tensor(n,k,device=CUDA,seed=i)) for i in range(max(1,-(-3*L2_BYTES//(n*k))))]
    return W[n,k]
big=[Tile(128,256,128,8,3),Tile(128,256,128,8,4),Tile(256,128,128,8,3),Tile(128,128,128,8,3),Tile(128,128,128,4,3),Tile(128,128,64,4,4),Tile(128,256,64,8,4)]
small=[Tile(16,32,256,4,5),Tile(16,32,512,4,5),Tile(16,64,256,4,5),Tile(16,32,256,4,3),Tile(16,16,512,4,5),Tile(16,32,512,8,4)]
mid=[Tile(64,32,256,4,5),Tile(64,64,256,4,4),Tile(64,64,128,4,5),Tile(32,32,256,4,5),Tile(64,128,128,4,4)]
for n,k in NK:
    for ms,tiles in (((4096,512),big),((64,),mid),((1,16),small)):
        for m in ms:
            x=random_tensor(m,k,device=CUDA); c,s=numerics.quantize_symmetric(x)
            for t in tiles:
                linear.W8A8_TILES=((math.inf,t),)
                try:
                    us=microseconds([lambda q=q,w=w: f(c,s,None,q,w,None,None,None,None,torch.bfloat16) for q,w in weights(n,k)],9)
                    print(m,n,k,t,us,_rates(m,n,k,us,1) if False else (round(2*m*n*k/us/1e6),"T",round(n*k/us/1e3),"GB/s"),flush=True)
                except Exception as e: print(m,n,k,t,"ERR",repr(e)[:100],flush=True)
