"""What the flash packages share."""

from __future__ import annotations

import torch

from headway.backends.flash_layout import lower, through
from headway.masks import Documents, Frame


def test_the_gradient_of_queries_without_keys_is_zero_whatever_a_kernel_leaves_there() -> None:
    """flash-attn-4 leaves what was in memory in dq of a document that has no keys."""
    q, k = torch.randn(1, 2, 12, 16, requires_grad=True), torch.randn(1, 2, 9, 16)
    for mask, blind in (
        (Documents([6, 6], [9, 0]), slice(6, 12)),
        (Documents([5, 4, 3], [0, 9, 0]), [*range(5), 9, 10, 11]),
    ):
        packed = lower(mask, Frame(12, 9, 1, 2), q.dtype).packed
        out, _ = through(q, k, k, packed, lambda q, k, v: (q * float("nan"), None))
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert bool((grad[:, :, blind] == 0).all())
        assert int(grad.isnan().any(-1).sum()) == 2 * (12 - grad[:, :, blind].shape[2])


def test_documents_of_one_packing_have_no_such_queries() -> None:
    assert lower(Documents([5, 4]), Frame(9, 9, 1, 2), torch.float32).packed.blind is None
