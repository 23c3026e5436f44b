"""A transformers model over several ranks, in place: torchrun --nproc-per-node 2 examples/parallelize_transformers.py
[DIR]"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_parallel as fp

path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "assets" / "tiny-target"
gpus_for_all = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
mesh = fp.init(device="cuda" if gpus_for_all else "cpu")

model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(mesh.device_type).eval()
# "tp" splits heads, features and vocabulary; fp.init(tp=1, pp=2) would cut the layers instead
model = fp.parallelize(model, mesh)

tokenizer = AutoTokenizer.from_pretrained(path)
ids = tokenizer("import os\n\ndef ", return_tensors="pt").input_ids.to(mesh.device_type)
out = model.generate(ids, max_new_tokens=60, do_sample=False)
if torch.distributed.get_rank() == 0:
    print(tokenizer.decode(out[0]))
fp.finalize()
