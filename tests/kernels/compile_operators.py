"""Compiles the operators' kernels for GPUs, with none here, and prints a line of JSON each.

Usage: compile_operators.py [--everything] [OPERATOR ...]; without ``--everything`` the first case of each kernel alone.
"""

import json
import sys

from cubins import compile_for

from archfront.kernels.ops import MODULES

CAPABILITIES = (80, 90, 100)

if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    for module in MODULES:
        if names and not set(names) & set(module.OPERATORS):
            continue
        cases = module.compile_cases()
        if "--everything" not in sys.argv:
            cases = list({case.kernel: case for case in reversed(cases)}.values())
        for case in cases:
            for capability in CAPABILITIES:
                if capability < case.since:
                    continue
                usage = compile_for(capability, case.kernel, case.arguments, **case.constants)
                told = {"module": module.__name__.split(".")[-1], "case": case.name, "capability": capability}
                expected = {"must_have_matrix": case.matrix, "spills": case.spills}
                print(json.dumps(told | expected | usage._asdict()), flush=True)
