"""Proof that a layout does not change the numbers: the oracle and the type check."""

from meshpeft.verify.layout import Verdict, verify_layout
from meshpeft.verify.oracle import Layout, Trace, compare, trace_layout
from meshpeft.verify.typecheck import typecheck_layout

__all__ = ["Layout", "Trace", "Verdict", "compare", "trace_layout", "typecheck_layout", "verify_layout"]
