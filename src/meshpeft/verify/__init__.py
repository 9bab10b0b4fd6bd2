"""Before a run: proof that its layout does not change the numbers (oracle, type check), and what it will cost."""

from meshpeft.verify.layout import Verdict, verify_layout
from meshpeft.verify.oracle import Layout, Trace, compare, trace_layout
from meshpeft.verify.plan import Plan, plan
from meshpeft.verify.typecheck import typecheck_layout
from meshpeft.verify.work import Traffic

__all__ = [
    "Layout",
    "Plan",
    "Trace",
    "Traffic",
    "Verdict",
    "compare",
    "plan",
    "trace_layout",
    "typecheck_layout",
    "verify_layout",
]
