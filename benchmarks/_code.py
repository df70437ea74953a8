import torch
import lowering.triton
from lowering.registry import *
from lowering import numerics
from torch._inductor.utils import run_and_get_code
ops=all_ops(); dev=torch.device("cuda")
x=random_tensor(48,4096,device=dev,dtype=torch.bfloat16); r=x.clone(); g=x[0].clone()
w,ws=numerics.quantize_weight(random_tensor(4096,4096,device=dev)); sums=w.sum(1,dtype=torch.int32)
cols=torch.arange(0,64,2,device=dev); ow=random_tensor(4096,32,device=dev,dtype=torch.bfloat16)
anq=[i for i in ops["add_norm_quantize"].implementations if i.target=="triton"][0].function
lin=[i for i in ops["linear_w8a8"].implementations if i.target=="triton"][0].function
dyn=[i for i in ops["split_quantize_dynamic"].implementations if i.target=="triton"][0].function
def f(x,r):
    h,c,s,z,o=anq(x,r,g,None,1e-5,0.0,"rms_round_first",cols,False)
    y=lin(c,s,z,w,ws,sums,None,o,ow,torch.bfloat16)
    c,s,z,o,cc,ov=dyn(y.relu(),32,6.0,True)
    y=lin(c,s,None,w,ws,None,None,o,w[:,cc],torch.bfloat16)
    return h+y
torch._dynamo.mark_dynamic(x,0); torch._dynamo.mark_dynamic(r,0)
with torch.no_grad():
    out,code=run_and_get_code(torch.compile(f,fullgraph=True),x,r)
print((out-f(x,r)).float().norm()/out.float().norm())
print("\n".join(code)[-9000:])
