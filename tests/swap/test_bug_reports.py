"""The model of the bug reports, tiny: 32 nn.MultiheadAttention (18 self, 14 cross) behind a backbone of transformers.

Three times a tool put its own attention into it. One had no batch_first, one refused every call with a key, one copied
the weight out of a projection that a wrapper scales. Here every site is swapped, swapped again, and put back.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites.test_multihead import MODES, Sigma, mode
from sites.test_replaced import FlashAttention, XFormersAttention, like
from torch import Tensor, nn

from headway.sites.site import site_of
from headway.swap import inspect, swap
from headway.watch import watch

tf = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
]

SIZE, HEADS = 16, 2
MULTIHEAD, BACKBONE = 32, 2


def decoder(layers: int) -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, 32, 0.1, batch_first=True), layers)


def encoder(layers: int) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, 32, 0.1, batch_first=True), layers)


class Manipulation(nn.Module):
    """Hands, objects and contacts from an image: each attention is called in the way it was there."""

    def __init__(self) -> None:
        super().__init__()
        config = tf.Dinov2Config(
            hidden_size=SIZE, num_hidden_layers=BACKBONE, num_attention_heads=HEADS, image_size=8, patch_size=4
        )
        self.image = tf.Dinov2Model(config)
        self.object_encoder, self.object_queries = encoder(3), decoder(3)
        self.contact_cross = nn.ModuleList(nn.MultiheadAttention(SIZE, HEADS, batch_first=True) for _ in range(2))
        self.contact_encoder = encoder(4)
        self.fusion = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
        self.object_decoder = decoder(4)
        self.contact_hands = nn.ModuleList(nn.MultiheadAttention(SIZE, HEADS, batch_first=True) for _ in range(2))
        self.contact_decoder = decoder(3)
        self.queries = nn.Parameter(torch.randn(1, 3, SIZE))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.image(image).last_hidden_state
        queries = self.queries.expand(len(image), -1, -1)
        objects = self.object_queries(queries, self.object_encoder(tokens))
        contacts = queries
        for cross in self.contact_cross:
            contacts = contacts + cross(query=contacts, key=objects, value=objects)[0]
        contacts = self.contact_encoder(contacts)
        joined = torch.stack([each.mean(1) for each in (tokens, objects, contacts)], 1)
        fused, weights = self.fusion(joined, joined, joined)
        objects = self.object_decoder(queries + fused.mean(1, keepdim=True), tokens)
        for cross in self.contact_hands:
            contacts = contacts + cross(query=contacts, key=objects, value=objects)[0]
        return {"objects": objects, "contacts": self.contact_decoder(contacts, objects), "weights": weights}


def made() -> Manipulation:
    torch.manual_seed(0)
    model = Manipulation().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def attention_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]


def replace(model: nn.Module, names: list[str], kind: Any) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        module: Any = model.get_submodule(name)
        projection = module.out_proj
        if isinstance(projection, Sigma):
            module.out_proj = projection.linear
        new = like(module, kind)
        new.out_proj = projection if isinstance(projection, Sigma) else new.out_proj
        setattr(model.get_submodule(parent), last, new.eval())


def wrap(model: nn.Module, names: tuple[str, ...]) -> None:
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, Sigma(getattr(module, name), 1.3))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_site_is_swapped_runs_in_every_mode_and_comes_back() -> None:
    """Backbone and heads, self and cross; not one by the fast path, and the backbone is no blind spot of the census."""
    stock, model = made(), made()
    assert len(attention_of(model)) == MULTIHEAD
    classes = [type(module) for module in model.modules()]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    for _ in range(2):
        done = swap(model, image())
        kinds = Counter(ticket.kind for ticket in done.census.swapped)
        assert kinds == {"nn.MultiheadAttention": MULTIHEAD, "transformers": BACKBONE}
        assert len(done.census.tickets) == MULTIHEAD + BACKBONE
        assert done.certificate is not None
        assert done.certificate.passed
    for module in (*stock.modules(), *model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    for name in MODES[:6]:
        before = {ticket.name: sum(ticket.runs.values()) + ticket.in_full for ticket in done.census.swapped}
        with mode(name, model):
            ours = model(image())
        assert_same(ours, stock.eval()(image()))
        for ticket in done.census.swapped:
            assert sum(ticket.runs.values()) + ticket.in_full == before[ticket.name] + 1, f"{ticket.name} in {name}"
    done.undo()
    assert [type(module) for module in model.modules()] == classes
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters


@pytest.mark.parametrize("sigma", (False, True), ids=("plain", "wrapped out_proj"))
def test_two_tools_replacements_are_turned_back(sigma: bool) -> None:
    """One tool took the encoders, the other what was left: not one forward ran to its end. Then it is as it was."""
    stock = made()
    if sigma:
        wrap(stock, ("out_proj",))
    model = copy.deepcopy(stock)
    encoders = [name for name in attention_of(model) if "encoder" in name]
    replace(model, encoders, FlashAttention)
    replace(model, attention_of(model), XFormersAttention)
    assert not attention_of(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises((AttributeError, NotImplementedError, TypeError)):
        model(image())
    swap(stock, image())  # PyTorch would read the weight of a wrapped out_proj, and raise
    for _ in range(2):
        done = swap(model, image())
        assert Counter(ticket.kind for ticket in done.census.swapped)["replaced attention"] == MULTIHEAD
        assert len(attention_of(model)) == MULTIHEAD
        assert not any(type(module).__name__ in ("XFormersAttention", "FlashAttention") for module in model.modules())
        assert_same(model(image()), stock(image()))
    assert list(model.state_dict()) == list(stock.state_dict())
    done.undo()
    assert [type(module) for module in model.modules()] == classes


def test_wrapped_linears_everywhere_run_in_every_mode_and_learn() -> None:
    """PyTorch's layers raise AttributeError 'weight' in evaluation; every sigma is read, and gets its gradient."""
    model = made()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(model)
    wrap(model, ("linear1", "linear2", "out_proj"))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Sigma):  # the same function, by plain weights
                weight = F.normalize(module.linear.weight, dim=1) * module.sigma
                plain.get_submodule(name).weight.copy_(weight)
    with pytest.raises(AttributeError, match="weight"):
        model(image())
    done = swap(model, image())
    assert len(done.census.swapped) == MULTIHEAD + BACKBONE
    for name in MODES[:6]:
        if name != "train":  # attention's own dropout
            with mode(name, model):
                assert_same(model(image()), plain(image()))
    sum(each.square().sum() for each in model.eval()(image()).values()).backward()
    learnt = {name: p.grad for name, p in model.named_parameters() if name.endswith("sigma")}
    assert len(learnt) == MULTIHEAD + 2 * (3 + 3 + 4 + 4 + 3)
    assert all(grad is not None and grad != 0 for grad in learnt.values())


def test_it_can_be_watched_while_it_is_swapped() -> None:
    """What was to be debugged when the model first broke: every attention's entropy, and what it was before."""
    model = made()
    seen = {}
    for when in ("before", "swapped"):
        with watch(model) as recording:
            sum(each.square().sum() for each in model(image()).values()).backward()
        seen[when] = recording
        model.zero_grad()
        swap(model, image())
    assert seen["swapped"].heads.keys() == seen["before"].heads.keys()
    assert len(seen["swapped"].heads) == MULTIHEAD + BACKBONE
    for name, before in seen["before"].heads.items():
        for head in range(HEADS):
            assert seen["swapped"].heads[name].entropy(head) == pytest.approx(before.entropy(head), rel=1e-4)
    assert all(one.reached for one in seen["swapped"].parameters.values()) == all(
        one.reached for one in seen["before"].parameters.values()
    )
    assert site_of(model.fusion) is not None


def test_the_census_names_each_of_them_before_anything_is_done() -> None:
    model = made()
    replace(model, ["fusion"], FlashAttention)
    census = inspect(model)
    assert len(census.tickets) == MULTIHEAD + BACKBONE
    assert {ticket.name: ticket.kind for ticket in census.tickets}["fusion"] == "replaced attention"
    assert type(model.fusion) is FlashAttention
