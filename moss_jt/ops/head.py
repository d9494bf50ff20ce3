"""The last norm and lm_head, all of it or some of its rows."""

from __future__ import annotations

from .kernel import check, run
from .weight import Weight

_CALL = """
const int64_t D = in0_shape1, V = in3_shape0;
moss::head(in0_p, moss::Norm{{in1_p, in2_p, (float)data["eps"]}}, {weight}, in3_p, out_p, in0_shape0, D, V);
"""


class Head:
    """``head(x)``: ln_f(x) lm_headᵀ + bias.

    tensors: name -> Var: ln_f.weight and ln_f.bias (D,), lm_head.weight (V, D) in ``bits`` bits, lm_head.bias (V,); they are
    read when it is called. Raises ValueError for a wrong shape.
    """

    def __init__(self, tensors: dict, bits: int, eps: float):
        self._vectors = [tensors[name] for name in ("ln_f.weight", "ln_f.bias", "lm_head.bias")]
        self._weight = Weight.of(tensors, "lm_head.weight", bits)
        (self._d,), (self._v,) = tensors["ln_f.weight"].shape, tensors["lm_head.bias"].shape
        check("head", {"ln_f.bias": ("float32", (self._d,))}, **{"ln_f.bias": tensors["ln_f.bias"]})
        self._weight.check("head: lm_head.weight", self._v, self._d)
        self._eps = eps
        self._call = _CALL.format(weight=self._weight.code(4, "V", "D"))

    def __call__(self, x):
        """Logits, float32 (T, V), of states x, float32 (T, D)."""
        check("head", {"x": ("float32", (x.shape[0], self._d))}, x=x)
        return run("block.h", (x.shape[0], self._v), [x, *self._vectors, *self._weight.parts], self._call, eps=self._eps)
