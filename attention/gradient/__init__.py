"""One room that owns "the model, differentiable": which patcher is loaded and how, its weights, what autograd saves.

ComfyUI is built for passes without gradient. What has to be otherwise for a pass with one is here, and nowhere else:
the model is loaded with memory for the backward pass beside it (`loading`, `memory`), its weights can take part in
autograd (`weights`) even where they are not on the device (`streamed`), kernels without a backward are left out
(`kernels`), and what its blocks overwrite is kept until the backward has used it (`saved`).
Where all that a pass saves does not fit, blocks are run again in the backward (`again`), as many as has been counted to
be needed (`count`, `plan`).
"""

from .again import EndOfPassError, run_again
from .errors import explain_not_finite
from .loading import MULTIGPU, copies_for_gradients, ready_for_gradients
from .memory import MEMORY, activation_bytes
from .plan import MemoryPlan
from .saved import saved_activations
from .weights import differentiable, gradients_on

__all__ = [
    "MEMORY",
    "MULTIGPU",
    "EndOfPassError",
    "MemoryPlan",
    "activation_bytes",
    "copies_for_gradients",
    "differentiable",
    "explain_not_finite",
    "gradients_on",
    "ready_for_gradients",
    "run_again",
    "saved_activations",
]
