"""Compiles the operators' kernels for GPUs, with none here, and prints a line of JSON each.

Usage: compile_operators.py [--everything | --some] [OPERATOR ...]; without either the first case of each kernel alone,
with ``--some`` four more of each module, spread over its cases.
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
            spread = cases[:: max(len(cases) // 4, 1)][:4] if "--some" in sys.argv else []
            first = {case.kernel: case for case in reversed(cases)}
            cases = list({case.name + str(case.kernel): case for case in [*first.values(), *spread]}.values())
        for case in cases:
            for capability in CAPABILITIES:
                if capability < case.since:
                    continue
                usage = compile_for(capability, case.kernel, case.arguments, **case.constants)
                told = {"module": module.__name__.split(".")[-1], "case": case.name, "capability": capability}
                expected = {"must_have_matrix": case.matrix, "spills": case.spills}
                print(json.dumps(told | expected | usage._asdict()), flush=True)
