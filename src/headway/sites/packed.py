"""Attention over rows of a batch and over packed sequences, as flash_attn and xFormers mean it.

Bounds are counted from the lower right of each row or sequence. Packed sequences are checked when they are first met;
on an accelerator no value is read for it, as that would wait, so there a wrong one fails an assertion on the device.

Where kernels know documents, packed sequences stay as they are. Elsewhere, as on CPU and on GPUs before sm80, a mask of
documents would be a square of all tokens; so there they are laid out as rows of a batch, with filler where they are
shorter, and on a CPU those of about one size apart from others. Sequences of one length are such rows already.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, _assert_async
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary

from headway.errors import RequestError
from headway.masks import Alibi, Bias, Causal, Documents, Mask, Padding, Predicate, Window
from headway.masks.base import shape_of
from headway.masks.causal import Align
from headway.masks.documents import Packing
from headway.masks.memo import Remembers, is_recorded, is_traced, lasts

Made = TypeVar("Made")

LARGEST = torch.iinfo(torch.int32).max
"""A bound that bounds nothing, so that all bounds are one program."""


class Attends(Protocol):
    """What computes attention, (B, H, L, D): a site, or one that is no model's."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None, dropout: float,
        softcap: float | None, sinks: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a call of flash_attn asks for beside its operands, in Headway's words."""

    left: int | None = None
    right: int | None = None
    """How many keys before and after its own position a query sees; None is no bound."""
    slopes: Tensor | None = None
    """Of ALiBi, (heads,) or (batch, heads); they get no gradient, as in flash_attn."""
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


# -- rows of a batch --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Ends(Remembers):
    """Where the real tokens of each row of a batch are, where rows have filler; it keeps the masks made of it."""

    queries: Tensor | None = None
    """How many queries each row has, from its start; None is all."""
    keys: Tensor | None = None
    """Where the keys of each row end; None is where the row ends."""
    first_key: Tensor | None = None
    """Where they begin; None is at the start."""


def attend_rows(
    site: Attends, q: Tensor, k: Tensor, v: Tensor, wanted: Wanted, ends: Ends | None = None
) -> tuple[Tensor, ...]:
    """q (B, H, L, D), k and v (B, G, S, D); the result has a row for each query, and so for filler too."""
    if ends is None:
        mask = both(band(wanted.left, wanted.right, "lower-right"), _alibi(wanted.slopes, q, k))
    else:
        mask = both(_over_filler(q, k, wanted, ends), _alibi(wanted.slopes, q, k, ends))
    return answered(site, q, k, v, mask, wanted)


def answered(site: Attends, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, wanted: Wanted) -> tuple[Tensor, ...]:
    """(result,), or (result, lse) from what answers with both."""
    answer = site.attend(
        q, k, v, mask, scale=wanted.scale, dropout=wanted.dropout, softcap=wanted.softcap, sinks=wanted.sinks
    )
    return answer if isinstance(answer, tuple) else (answer,)


def _over_filler(q: Tensor, k: Tensor, wanted: Wanted, ends: Ends) -> Mask | None:
    """The mask over rows with filler; what queries that are filler see is of no interest, but for its cost."""

    def make() -> Mask | None:
        if not _ends_differ(q, k, ends):
            plain = band(wanted.left, wanted.right, "lower-right")
            # Causal, no real query sees what is after it, and kernels know causal best when it stands alone.
            alone = wanted.right == 0 and ends.first_key is None
            return plain if alone else both(_real_keys(k, ends), plain)
        return both(_real_keys(k, ends), _shifted_band(wanted.left, wanted.right, _diagonals(q, k, ends)))

    return remembered(ends, ("mask", q.shape[2], k.shape[2], wanted.left, wanted.right), make)


def _ends_differ(q: Tensor, k: Tensor, ends: Ends) -> bool:
    """Whether queries and keys of a row may end at different places."""
    return ends.queries is not ends.keys or q.shape[2] != k.shape[2]


def _diagonals(q: Tensor, k: Tensor, ends: Ends) -> Tensor:
    """For each row the key that its first query is lined up with."""
    last_key = k.shape[2] if ends.keys is None else ends.keys
    diagonals = last_key - (q.shape[2] if ends.queries is None else ends.queries)
    if isinstance(diagonals, int):
        return torch.full((q.shape[0],), diagonals, dtype=torch.int32, device=q.device)
    return diagonals.to(torch.int32)


def _real_keys(k: Tensor, ends: Ends) -> Mask | None:
    if ends.first_key is None:
        return None if ends.keys is None else Padding(ends.keys)
    at = torch.arange(k.shape[2], device=k.device)
    real = at >= ends.first_key[:, None]
    return Padding(real if ends.keys is None else real & (at < ends.keys[:, None]))


def _shifted_band(left: int | None, right: int | None, diagonal: Tensor) -> Mask | None:
    if (left, right) == (None, None):
        return None
    low, high = _bounds(left, right, diagonal.device)

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        step = k - q - diagonal[b]
        return (step >= low) & (step <= high)

    return Predicate(near)


# -- packed sequences -------------------------------------------------------------------------------------------------


def packing(
    name: str, starts: Tensor, total: int | None, longest: int | Tensor | None, device: torch.device
) -> Packing:
    """Cumulative lengths, checked; once for all layers that are given the same tensor. A total of None is any."""
    if not isinstance(starts, Tensor):
        raise RequestError(
            f"got {name} of type {type(starts).__name__}, takes a tensor: torch.tensor({name}, dtype=torch.int32)"
        )
    longest = int(longest) if isinstance(longest, Tensor) else longest  # a tracer's number must stay its own
    if not lasts(device) or starts.is_inference():  # which does not tell when it changes
        return _packing(name, starts, total, longest, device)
    known = _PACKINGS.get(starts)
    if known is None or known[0] != starts._version:
        known = _PACKINGS[starts] = starts._version, {}
    found: Packing | None = known[1].get((total, longest, device))
    if found is None:
        with torch.inference_mode(False):  # made for inference it serves training too
            found = known[1][total, longest, device] = _packing(name, starts, total, longest, device)
    return found


_PACKINGS: Any = WeakIdKeyDictionary()
"""By a tensor of cumulative lengths, its version, and the packings made of it."""


def _packing(name: str, starts: Tensor, total: int | None, longest: int | None, device: torch.device) -> Packing:
    if starts.dtype != torch.int32 or starts.dim() != 1 or starts.shape[0] < 2:
        raise RequestError(
            f"got {name} {shape_of(starts)}, takes int32 (sequences + 1,): the cumulative lengths, with 0 in front;"
            " F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))"
        )
    if starts.device.type == "cpu" and not is_compiling():
        return _read_packing(name, starts.tolist(), total, longest)
    if starts.device != device:
        raise RequestError(
            f"got {name} on {starts.device} for operands on {device}, takes one device: {name}.to(device)"
        )
    steps = starts.diff()
    right = (starts[0] == 0) & (steps.min() >= 0)
    if total is not None:
        right = right & (starts[-1] == total)
    if longest is not None:
        right = right & (steps.max() <= longest)
    _assert_async(
        right,
        f"takes {name} that start at 0, never decrease, end at the number of tokens, and are at most max_seqlen apart",
    )
    most = longest if longest is not None else total
    assert most is not None
    return Packing(starts.clone(), most * len(steps) if total is None else total, most)


def _read_packing(name: str, starts: list[int], total: int | None, longest: int | None) -> Packing:
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0:
        raise RequestError(
            f"got {name} that start at {starts[0]}, takes a 0 in front of the cumulative lengths: F.pad({name}, (1, 0))"
        )
    if min(lengths) < 0:
        at = lengths.index(min(lengths))
        raise RequestError(
            f"got {name} that fall from {starts[at]} to {starts[at + 1]}, takes cumulative lengths, which never"
            " decrease: lengths.cumsum(0, dtype=torch.int32)"
        )
    if total is not None and starts[-1] != total:
        raise RequestError(
            f"got {name} that end at {starts[-1]} for {total} tokens, takes lengths that add up to all of them:"
            " cut the filler off, or count it as a sequence of its own"
        )
    if longest is not None and max(lengths) > longest:
        raise RequestError(
            f"got max_seqlen {longest} for a sequence of {max(lengths)} in {name}, takes {max(lengths)} or more"
        )
    return Packing(torch.tensor(starts, dtype=torch.int32), starts[-1], max(lengths), tuple(lengths))


def attend_packed(
    site: Attends, q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, wanted: Wanted
) -> tuple[Tensor, ...]:
    """q (tokens, H, D), k and v (tokens, G, D); the result (tokens, H, D), and lse (H, tokens) if the site tells it."""
    if queries.starts.shape != keys.starts.shape:
        raise RequestError(
            f"got cumulative lengths of {queries.count} sequences of queries and {keys.count} of"
            " keys, takes as many of one as of the other; a sequence may have length 0"
        )
    _check_slopes(wanted.slopes, queries.count, q.shape[1])
    if _is_full(queries) and _is_full(keys):
        rows = [_in_rows(x, at) for x, at in ((q, queries), (k, keys), (v, keys))]
        out, *lse = attend_rows(site, rows[0], rows[1], rows[2], wanted)
        return (out.transpose(1, 2).flatten(0, 1), *(x.transpose(0, 1).flatten(1) for x in lse))
    groups = _groups(q, queries, keys)
    if groups is not None:
        return _attend_groups(site, q, k, v, groups, wanted)
    if _stays_packed(q, queries, keys, wanted):
        return _as_documents(site, q, k, v, queries, keys, wanted)
    return attend_padded(site, q, put(k, keys), put(v, keys), queries, keys, wanted)


def _in_rows(x: Tensor, packing: Packing) -> Tensor:
    return x.reshape(packing.count, packing.longest, *x.shape[1:]).transpose(1, 2)


def _is_full(packing: Packing) -> bool:
    """Whether all sequences are as long as the longest, by their sum; nothing is read."""
    return packing.count * packing.longest == packing.total


def _stays_packed(q: Tensor, queries: Packing, keys: Packing, wanted: Wanted) -> bool:
    """Whether a kernel here knows documents with all that is wanted, or their padded rows would be more work."""
    padded = queries.count * queries.longest * keys.longest
    alike = wanted.slopes is None or (wanted.slopes.dim() == 1 and queries is keys)
    if padded > queries.total * keys.total and alike:
        return True
    return _kernels_know_documents(q) and alike and not wanted.dropout


def _kernels_know_documents(q: Tensor) -> bool:
    if q.device.type != "cuda" or torch.version.hip is not None or q.dtype == torch.float64:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _as_documents(
    site: Attends, q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, wanted: Wanted
) -> tuple[Tensor, ...]:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))

    def make() -> Mask:
        return within(Documents.packed(queries, keys), wanted.left, wanted.right, "lower-right", q)

    mask = remembered(queries, ("mask", keys, wanted.left, wanted.right, q.device), make)
    mask = mask if wanted.slopes is None else mask & Alibi(wanted.slopes.detach().to(q.device), "lower-right")
    answer = answered(site, q, k, v, mask, wanted)
    # A batch of one is squeezed off: the gradient of an index is a copy into zeros.
    return tuple(x.squeeze(0) if x.dim() == 3 else x.squeeze(0).transpose(0, 1) for x in answer)


# -- packed sequences as rows of a batch ------------------------------------------------------------------------------


def attend_padded(
    site: Attends, q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, wanted: Wanted
) -> tuple[Tensor, ...]:
    """Packed queries, (tokens, H, D), and keys already in rows, (sequences, length, G, D)."""
    q, k, v = (x.transpose(1, 2) for x in (put(q, queries), k, v))
    out, *lse = attend_rows(site, q, k, v, wanted, _ends(queries, keys, q.device))
    return (take(out.transpose(1, 2), queries), *(take(x.transpose(1, 2), queries).transpose(0, 1) for x in lse))


def _ends(queries: Packing, keys: Packing, device: torch.device) -> Ends:
    def make() -> Ends:
        real_keys = keys.on(device).diff()
        return Ends(real_keys if keys is queries else queries.on(device).diff(), real_keys)

    return remembered(queries, ("ends", keys, device), make)


def put(x: Tensor, packing: Packing) -> Tensor:
    """(tokens, ...) as (sequences, longest, ...), with zeros for filler."""
    count, longest = packing.count, packing.longest
    return _spread(x, _places(packing, x.device), count * longest).view(count, longest, *x.shape[1:])


def _spread(x: Tensor, places: Tensor, room: int) -> Tensor:
    return x.new_zeros(room, *x.shape[1:]).index_put_((places,), x)


def take(x: Tensor, packing: Packing) -> Tensor:
    """(sequences, longest, ...) as (tokens, ...): `put`, undone."""
    return x.flatten(0, 1).index_select(0, _places(packing, x.device))


def _places(packing: Packing, device: torch.device) -> Tensor:
    """For each token its place in the rows of a batch."""

    def find() -> tuple[Tensor]:
        row = packing.ids(packing.total, device).clamp(max=packing.count - 1)
        at = torch.arange(packing.total, dtype=torch.int32, device=device) - packing.on(device)[row]
        return ((row * packing.longest + at).long(),)

    return packing.once("places", device, find)[0]


# -- packed sequences as rows of a batch for each size ----------------------------------------------------------------

WORTH = 2**24
"""How many products of features filler must cost before some sequences are laid out apart: a millisecond of a core."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences of about one size, by their numbers, and how they are packed among themselves."""

    members: list[int]
    queries: Packing
    keys: Packing


@dataclasses.dataclass(frozen=True)
class Groups:
    each: list[Group]
    q_places: Tensor
    """For each token its place in the rows of all groups, which lie end to end."""
    k_places: Tensor


def _groups(q: Tensor, queries: Packing, keys: Packing) -> Groups | None:
    """Sequences by size where the host knows their lengths and the CPU computes; None if they are best all together.

    A group begins where filler would be most of the work. So they are few, however many sequences there are.
    """
    if q.device.type != "cpu" or queries.lengths is None or keys.lengths is None or is_compiling():
        return None
    features = q.shape[1] * q.shape[2]
    sizes = [length * other for length, other in zip(queries.lengths, keys.lengths, strict=True)]

    def make() -> Groups | None:
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        edges = [0]
        for at, number in enumerate(order):
            filler = sizes[order[edges[-1]]] - sizes[number]
            if filler > sizes[number] and filler * (len(order) - at) * features > WORTH:
                edges.append(at)
        if len(edges) == 1:
            return None
        members = [order[first:last] for first, last in itertools.pairwise([*edges, len(order)])]
        q_packings, q_places = _apart(queries, members)
        k_packings, k_places = (q_packings, q_places) if keys is queries else _apart(keys, members)
        return Groups(list(map(Group, members, q_packings, k_packings)), q_places, k_places)

    return remembered(queries, ("groups", keys, features), make)


def _apart(packing: Packing, groups: list[list[int]]) -> tuple[list[Packing], Tensor]:
    """The packing of each group, and the place of each token in the rows of all."""
    lengths = torch.tensor(packing.lengths)
    packings = [Packing.of(lengths[members]) for members in groups]
    widths = [each.longest for each in packings for _ in range(each.count)]
    firsts = torch.empty_like(lengths)
    firsts[list(itertools.chain(*groups))] = torch.tensor([0, *itertools.accumulate(widths[:-1])])
    shifts = firsts - packing.starts[:-1]
    return packings, torch.arange(packing.total) + shifts.repeat_interleave(lengths)


def _attend_groups(
    site: Attends, q: Tensor, k: Tensor, v: Tensor, groups: Groups, wanted: Wanted
) -> tuple[Tensor, ...]:
    q_packings, k_packings = [each.queries for each in groups.each], [each.keys for each in groups.each]
    rows = zip(
        groups.each,
        _in_groups(q, groups.q_places, q_packings),
        _in_groups(k, groups.k_places, k_packings),
        _in_groups(v, groups.k_places, k_packings),
        strict=True,
    )
    parts = [attend_rows(site, q, k, v, *_of(group, wanted)) for group, q, k, v in rows]
    out, *lse = (torch.cat([x.transpose(1, 2).flatten(0, 1) for x in each]) for each in zip(*parts, strict=True))
    return (out.index_select(0, groups.q_places), *(x.index_select(0, groups.q_places).transpose(0, 1) for x in lse))


def _in_groups(x: Tensor, places: Tensor, packings: list[Packing]) -> Iterator[Tensor]:
    rooms = [each.count * each.longest for each in packings]
    return map(_in_rows, _spread(x, places, sum(rooms)).split(rooms), packings)


def _of(group: Group, wanted: Wanted) -> tuple[Wanted, Ends | None]:
    """What is wanted of a group, and where its rows end."""
    if wanted.slopes is not None and wanted.slopes.dim() == 2 and len(wanted.slopes) > 1:
        wanted = dataclasses.replace(wanted, slopes=wanted.slopes[group.members])
    if _is_full(group.queries) and _is_full(group.keys):
        return wanted, None
    return wanted, _ends(group.queries, group.keys, group.queries.starts.device)


# -- masks ------------------------------------------------------------------------------------------------------------


def band(left: int | None, right: int | None, align: Align) -> Mask | None:
    if (left, right) == (None, None):
        return None
    return Causal(align) if (left, right) == (None, 0) else Window(left, right, align)


def _alibi(slopes: Tensor | None, q: Tensor, k: Tensor, ends: Ends | None = None) -> Mask | None:
    """Slopes per head, or per row and head; distances are from where the queries and keys of a row end."""
    if slopes is None:
        return None
    batch, heads = q.shape[:2]
    _check_slopes(slopes, batch, heads)
    slopes = slopes.detach().view(-1, heads)
    if len(slopes) == 1 and (ends is None or not _ends_differ(q, k, ends)):
        return Alibi(slopes[0], "lower-right")
    at = torch.arange(q.shape[2], device=q.device) + _diagonals(q, k, ends or Ends())[:, None]
    distance = (at[:, None, :, None] - torch.arange(k.shape[2], device=q.device)).abs()
    return Bias(-slopes[..., None, None] * distance)


def _check_slopes(slopes: Tensor | None, batch: int, heads: int) -> None:
    if slopes is not None and tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise RequestError(
            f"got alibi_slopes {list(slopes.shape)}, takes ({heads},) or ({batch}, {heads}): one for each head,"
            " or for each batch entry and head"
        )


def both(*masks: Mask | None) -> Mask | None:
    """All of the masks that there are."""
    some = [mask for mask in masks if mask is not None]
    return functools.reduce(lambda one, other: one & other, some) if some else None


def within(documents: Documents, left: int | None, right: int | None, align: Align, q: Tensor) -> Mask:
    """A band inside each document, aligned there."""
    if (left, right) == (None, None) or not q.shape[2]:
        return documents
    if documents.one_packing:  # where indices differ as they do inside each document
        return documents & cast(Mask, band(left, right, align))
    diagonal = _diagonal(documents.queries, documents.keys, align, q)
    low, high = _bounds(left, right, q.device)

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        step = k - diagonal[q]
        return (step >= low) & (step <= high)

    return documents & Predicate(near)


def _bounds(left: int | None, right: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """As tensors, made without a copy from the host, which would wait."""
    low, high = -LARGEST if left is None else -left, LARGEST if right is None else right
    return tuple(torch.full((), bound, dtype=torch.int32, device=device) for bound in (low, high))  # type: ignore[return-value]


def _diagonal(queries: Packing, keys: Packing, align: Align, q: Tensor) -> Tensor:
    """For each query the key that its document lines it up with."""
    at = slice(1, None) if align == "lower-right" else slice(None, -1)
    shifts = keys.on(q.device)[at] - queries.on(q.device)[at]
    count = q.shape[2]
    documents = queries.ids(count, q.device).clamp(max=len(shifts) - 1)
    return torch.arange(count, dtype=torch.int32, device=q.device) + shifts[documents]


_MASKS: Any = WeakIdKeyDictionary()
"""By a tensor or a bias, the last masks made of it."""


def kept(
    anchor: Any, other: Any, state: Any, device: torch.device, at: tuple[Any, ...], make: Callable[[], Made]
) -> Made:
    """What `make` makes of two things for `device`, again only once they have changed."""
    if not lasts(device):
        return make()
    known = _MASKS.get(anchor)
    if known is None or known[0]() is not other or known[1] != state:
        known = _MASKS[anchor] = weakref.ref(other), state, {}
    at = (*at, device, torch.is_inference_mode_enabled())
    if at not in known[2]:
        known[2][at] = make()
    return cast(Made, known[2][at])


def remembered(owner: Remembers, what: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` makes of `owner`, once; nobody's tensors are kept by it but those of `owner`."""
    if is_traced() or any(is_recorded(x.device) for x in vars(owner).values() if isinstance(x, Tensor)):
        return make()
    at = (what, torch.is_inference_mode_enabled())
    if at not in owner.memo:
        owner.memo[at] = make()
    return cast(Made, owner.memo[at])
