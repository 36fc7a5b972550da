"""Compiles the depthwise kernel for sm_80 and sm_90 and prints a line of JSON each."""

import json
import sys

import torch
from cubins import compile_for

from archfront.kernels.triton.depthwise import depthwise_kernel, plan

# FBNet's planes: large ones, and the last, whose tiles are wide in channels. The first two need most registers.
CASES = (
    ((1, 1104, 7, 7), 5, 1, torch.float32),
    ((8, 144, 56, 56), 5, 2, torch.float16),
    ((1, 96, 112, 112), 3, 2, torch.float32),
    ((8, 1104, 7, 7), 3, 1, torch.float16),
)

if __name__ == "__main__":
    for capability in (80, 90):
        for shape, kernel, stride, dtype in CASES if "--everything" in sys.argv else CASES[:2]:
            launch = plan(torch.Size(shape), kernel, stride, relu=True)
            tensors = (dtype, dtype, torch.float32, torch.float32, dtype)
            usage = compile_for(capability, depthwise_kernel, (*tensors, *launch.sizes), **launch.constants)
            print(json.dumps({"case": f"{shape} k{kernel} s{stride} {dtype}", **usage._asdict()}))
