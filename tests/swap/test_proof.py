"""The proof: it fails what is wrong, passes what is right, says who judged, and leaves no trace."""

from __future__ import annotations

import copy
import json
import logging
import logging.handlers
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.errors import CertificateError
from headway.sites.site import Site, site_of
from headway.swap import Swap, swap
from headway.swap.judge import errors_of
from headway.swap.still import still
from headway.swap.verify import read, verify

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """An encoder layer with a mask and dropout, and a module that calls the function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(16, 2, 32, 0.3, batch_first=True)
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        out: Tensor = self.own(self.first(x, mask))
        return out


def made(dtype: torch.dtype = torch.float32) -> Model:
    """With logits of a size as trained models have them: where all are near 0 bfloat16 hides a wrong scale."""
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for weight in (model.first.self_attn.in_proj_weight, model.own.qkv.weight):
            weight[:32] *= 4
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


real = Site.attend


def scale_wrong(self: Site, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """1 % off; in bfloat16 5 %, as rounding q alone moves scores by near 1 % there."""
    return real(self, q * (1.05 if q.dtype == torch.bfloat16 else 1.01), *args, **kwargs)


def output_wrong(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    return real(self, *args, **kwargs) * 1.01


def mask_dropped(self: Site, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
    return real(self, q, k, v, None, **kwargs)


def one_nan(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    out = real(self, *args, **kwargs).clone()
    out[0, 0, 0, 0] = float("nan")
    return out


def dropout_on(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    return real(self, *args, **{**kwargs, "dropout": 0.1})


def one_element(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    out = real(self, *args, **kwargs).clone()
    out[-1, -1, -1, -1] += 0.1
    return out


def no_gradient(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    out = real(self, *args, **kwargs)
    return out.detach() + 0 * out


def key_is_value(self: Site, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return real(self, q, v, k, *args, **kwargs)


def another_shape(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    return real(self, *args, **kwargs)[:, :, :-1]


def an_exception(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    raise IndexError("planted")


def gradient_wrong(self: Site, *args: Any, **kwargs: Any) -> Tensor:
    """The forward as it should be; 5 % off, in bfloat16 20 %, which its rounding is not far below."""
    out = real(self, *args, **kwargs)
    off = out * (0.2 if out.dtype == torch.bfloat16 else 0.05)
    return out + off - off.detach()


PLANTED = (
    gradient_wrong, scale_wrong, output_wrong, mask_dropped, one_nan, dropout_on, one_element, no_gradient,
    key_is_value, another_shape, an_exception,
)  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("wrong", PLANTED, ids=lambda wrong: wrong.__name__)
def test_a_planted_mistake_fails_the_proof(
    wrong: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site is put back, the census says why, and the model answers as it did."""
    model = made(dtype).eval()
    truth = model(batch(dtype))
    monkeypatch.setattr(Site, "attend", wrong)
    done = swap(model, batch(dtype))
    assert done.certificate is not None
    assert not done.certificate.passed
    assert done.census.swapped == ()
    for ticket in done.census.tickets:
        assert "it failed the proof: " in ticket.because
        assert ticket.because in str(done)
    assert [type(m) for m in model.modules()] == [type(m) for m in Model().modules()]
    assert torch.equal(model(batch(dtype)), truth)
    assert done.certificate.whole is None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("asked", ("auto", "sdpa-math"))
def test_half_a_percent_is_no_rounding_in_half_precision_either(
    asked: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(dtype).eval()
    assert swap(model, batch(dtype), backend=asked).certificate.passed  # type: ignore[union-attr]
    monkeypatch.setattr(Site, "attend", lambda *args, **kwargs: real(*args, **kwargs) * 1.005)
    done = swap(model, batch(dtype), backend=asked)
    assert done.census.swapped == ()
    assert done.certificate is not None
    for proof in done.certificate.proofs:
        assert "forward in float64" in [errors.what for errors in proof.errors if not errors.passed]


def test_one_wrong_site_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_at_own(self: Site, *args: Any, **kwargs: Any) -> Tensor:
        return (scale_wrong if self.ticket.name == "own" else real)(self, *args, **kwargs)

    monkeypatch.setattr(Site, "attend", wrong_at_own)
    model = made().eval()
    done = swap(model, batch())
    assert [t.name for t in done.census.swapped] == ["first.self_attn"]
    assert site_of(model.own) is None
    assert done.certificate is not None
    assert not done.certificate.passed
    assert done.certificate.failure("own").startswith(("forward", "gradient"))
    assert done.certificate.failure("first.self_attn") == ""
    assert done.certificate.whole is not None
    assert done.certificate.whole.failure == "", "the whole is proven as it is now, with the one site put back"


def test_a_child_that_fails_is_not_taken_by_its_parents_redirection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back inside a swapped module, it calls PyTorch's function again and nobody else's."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.own(x), x, x)

    ran: list[str] = []

    model = nn.Sequential(Parent())

    def attend_named(self: Site, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(self.ticket.name)
        return (scale_wrong if self.ticket.name == "0.own" else real)(self, *args, **kwargs)

    monkeypatch.setattr(Site, "attend", attend_named)
    done = swap(model, batch())
    by_name = {ticket.name: ticket for ticket in done.census.tickets}
    assert not by_name["0.own"].swapped
    ran.clear()
    model(batch())
    assert ran == (["0"] if by_name["0"].swapped else [])
    done.undo()
    assert [type(m) for m in model.modules()] == [nn.Sequential, Parent, Own, nn.Linear]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("backend", ("auto", "reference", "sdpa-math"))
def test_what_is_right_passes(dtype: torch.dtype, backend: str) -> None:
    """Every site and the whole model, forward and every gradient, against float64."""
    done = swap(made(dtype), batch(dtype), backend=backend)
    certificate = done.certificate
    assert certificate is not None
    assert certificate.passed, str(done)
    assert certificate.whole is not None
    for proof in (*certificate.proofs, certificate.whole):
        assert proof.judge == "float64"
        assert proof.backends
        assert {errors.what for errors in proof.errors} >= {"forward", "gradient of input 0"}
        assert all(errors.judged == 1 for errors in proof.errors)
    names = {errors.what for errors in certificate.whole.errors}
    assert names >= {f"gradient of {name}" for name, _ in done.model.named_parameters()}
    assert backend == "auto" or all(backend in proof.backends for proof in certificate.proofs)


class Casts(nn.Module):
    """Computes in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.own(x.to(torch.float32))
        return out


def test_a_model_that_casts_inside_is_judged_by_itself_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 cannot run it from end to end: then its own answer of before judges, and a mistake is still found."""
    model = Casts()
    done = swap(model, batch())
    assert done.certificate is not None
    assert done.certificate.passed
    assert done.certificate.whole is not None
    assert done.certificate.whole.judge.startswith("the model as it was (RuntimeError: ")
    assert done.certificate.proofs[0].judge == "float64"
    done.undo()
    monkeypatch.setattr(Site, "attend", scale_wrong)
    assert swap(model, batch()).census.swapped == ()


class Numpy(nn.Module):
    """Takes its second input, and with `of_weights` what comes of its weights, as a NumPy array."""

    def __init__(self, of_weights: bool = False) -> None:
        super().__init__()
        self.own, self.of_weights = Own(), of_weights

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = self.own(x * float(scale.numpy()[0]) + shift)
        return out + float(out.numpy().mean()) if self.of_weights else out


def test_an_input_that_a_model_takes_as_an_array_is_left_out_of_the_gradients_and_said_so(tmp_path: Path) -> None:
    done = swap(Numpy().eval(), (batch(), torch.ones(3), torch.ones(16)))
    certificate = done.certificate
    assert certificate is not None
    assert certificate.passed, str(done)
    assert [proof.judge for proof in certificate.proofs] == ["float64"]
    whole = certificate.whole
    assert whole is not None
    text = "float64, without gradients of input 1 (RuntimeError: Can't call numpy() on Tensor that requires grad."
    assert whole.judge.startswith(text)
    assert f"the whole model is judged by {whole.judge}" in str(certificate)
    judged = {errors.what for errors in whole.errors}
    assert {"forward", "gradient of input 0", "gradient of input 2", "gradient of own.qkv.weight"} <= judged
    assert "gradient of input 1" not in judged
    assert read(certificate.save(tmp_path / "c.json")) == certificate


def test_a_model_that_takes_what_its_weights_give_as_an_array_is_judged_forward() -> None:
    with torch.no_grad():  # as it has to be run
        Numpy(of_weights=True)(batch(), torch.ones(3), torch.ones(16))
    done = swap(Numpy(of_weights=True).eval(), (batch(), torch.ones(3), torch.ones(16)))
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    whole = done.certificate.whole
    assert whole is not None
    assert whole.judge.startswith("float64, without any gradient (RuntimeError: Can't call numpy()")
    assert [errors.what for errors in whole.errors] == ["forward"]


class OwnNumpy(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + float(x.numpy().mean())


@pytest.mark.parametrize("wrong", [False, True])
def test_a_mistake_in_a_site_that_takes_arrays_is_still_found(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if wrong:
        monkeypatch.setattr(Site, "attend", scale_wrong)
    done = swap(nn.Sequential(OwnNumpy()).eval(), batch() * 4)
    assert done.certificate is not None
    (proof,) = done.certificate.proofs
    assert "without gradients of input 0" in proof.judge
    assert done.certificate.passed is not wrong


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        out: Tensor = self.own(x)
        return out


@pytest.mark.parametrize("seed", range(12))
def test_a_bend_that_one_rounding_crosses_is_no_mistake(seed: int) -> None:
    """In bfloat16 a relu near 0 is on or off by chance, and with it whole rows of a gradient: 1 model in 6 failed."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.manual_seed(seed + 12)
    done = swap(model.to(torch.bfloat16), torch.randn(2, 6, 16).to(torch.bfloat16))
    assert done.certificate is not None
    assert done.certificate.passed, str(done)


def test_other_exceptions_of_a_model_are_its_own() -> None:
    model = Raises()
    with pytest.raises(RuntimeError, match="no gradients here"):
        swap(model, batch())
    assert type(model.own) is Own


def test_rows_that_see_nothing_are_left_out_and_counted() -> None:
    """PyTorch says NaN there, which judges nothing; the certificate says what share could be judged."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            filler = torch.zeros(x.shape[:2], dtype=torch.bool)
            filler[0] = True
            out: Tensor = self.attention(x, x, x, key_padding_mask=filler)[0]
            return out

    model = Padded()
    assert model(batch())[0].isnan().all()
    done = swap(model, batch())
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    judged = {errors.what: errors.judged for errors in done.certificate.proofs[0].errors}
    assert judged["forward"] == 0.5
    assert model(batch()).isfinite().all()


# -- the certificate --------------------------------------------------------------------------------------------------


def proven() -> Swap:
    return swap(made(), batch())


def test_a_certificate_goes_to_a_file_and_back(tmp_path: Path) -> None:
    certificate = proven().certificate
    assert certificate is not None
    path = certificate.save(tmp_path / "certificate.json")
    again = read(path)
    assert again.as_dict() == certificate.as_dict()
    assert again.passed
    assert str(again) == str(certificate)
    data = json.loads(path.read_text())
    assert data["facts"]["versions"]["torch"] == torch.__version__
    assert data["facts"]["seed"] is not None
    assert {proof["name"] for proof in data["proofs"]} == {"first.self_attn", "own"}
    assert len(data["deck"]) >= 12
    verdict = verify(path)
    assert verdict.holds
    assert verdict.differs == ()


def test_a_failed_certificate_goes_to_a_file_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with NaN and infinity in it, which JSON has no numbers for."""
    with monkeypatch.context() as patch:
        patch.setattr(Site, "attend", one_nan)
        certificate = proven().certificate
    assert certificate is not None
    path = certificate.save(tmp_path / "failed.json")
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not read(path).passed
    assert not verify(path).holds
    assert read(path).as_dict() == certificate.as_dict()


def _edited(data: dict[str, Any], how: str) -> Any:
    if how == "verdict":
        data["passed"] = not data["passed"]
    elif how == "number":
        data["proofs"][0]["errors"][0]["worst_now"] = 1e9
    elif how == "missing":
        del data["proofs"][0]["judge"]
    elif how == "added":
        data["proofs"][0]["note"] = "fine"
    elif how == "word":
        data["proofs"][0]["errors"][0]["eps"] = "small"
    elif how == "format":
        data["format"] = "headway certificate 0"
    elif how == "list":
        return [data]
    return data


@pytest.mark.parametrize("how", ("verdict", "number", "missing", "added", "word", "format", "list"))
def test_an_edited_certificate_is_refused(how: str, tmp_path: Path) -> None:
    certificate = proven().certificate
    assert certificate is not None
    path = certificate.save(tmp_path / "certificate.json")
    path.write_text(json.dumps(_edited(json.loads(path.read_text()), how)))
    with pytest.raises(CertificateError):
        read(path)


# -- no trace ---------------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Everything that a run would change: running statistics, a counter, dropout, a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.own = nn.BatchNorm1d(16), nn.Dropout(0.5), Own()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = torch.rand(2)
        out: Tensor = self.own(self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2)))
        return out


@pytest.mark.parametrize("training", (True, False))
def test_a_swap_leaves_buffers_gradients_modes_and_seeds(training: bool) -> None:
    model = Counts().train(training)
    model.drop.train()
    model(batch()).sum().backward()
    x = batch().requires_grad_()
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    grads = {name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    modes, seeds = [m.training for m in model.modules()], torch.get_rng_state()
    done = swap(model, x)
    assert len(done.census.swapped) == 1
    for _ in range(2):
        assert {name: id(b) for name, b in model.named_buffers()} == {name: i for name, (i, _) in buffers.items()}
        assert all(torch.equal(b, buffers[name][1]) for name, b in model.named_buffers())
        for name, p in model.named_parameters():
            assert id(p.grad) == grads[name][0]
            assert p.grad is None or torch.equal(p.grad, grads[name][1])  # type: ignore[arg-type]
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), seeds)
        assert x.grad is None
        assert x.requires_grad
        done.undo()


def test_the_example_is_not_changed() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.own(x * 2)
            return out

    x = batch()
    was, version = x.clone(), x._version
    swap(InPlace(), {"x": x})
    assert torch.equal(x, was)
    assert x._version == version


def test_still_puts_back_also_after_an_exception() -> None:
    model = Counts().train()
    model.drop.eval()
    seeds, last = torch.get_rng_state(), model.last

    def fails() -> None:
        assert not any(m.training for m in model.modules())
        model(batch())
        raise KeyError

    with pytest.raises(KeyError), still(model):
        fails()
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), seeds)
    assert model.last is last
    assert model.count == 0


# -- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_knows_one_percent_from_rounding() -> None:
    """In bfloat16 too, where the worst element alone would not show it."""
    truth = torch.randn(1000, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps, before = torch.finfo(dtype).eps, truth.to(dtype)
        assert errors_of("forward", truth, before, truth.to(dtype), eps).passed
        assert not errors_of("forward", truth, before, (truth * 1.01).to(dtype), eps).passed
        assert not errors_of("forward", truth, before, None, eps).passed
        spoilt = truth.to(dtype).clone()
        spoilt[3] = float("nan")
        assert not errors_of("forward", truth, before, spoilt, eps).passed
        assert errors_of("forward", truth, spoilt, before, eps).judged == 0.999


def test_a_copy_is_proven_not_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters that the proof moves around in dtype are copies: not one is touched."""
    model = made()
    versions = {name: (id(p), p._version, p.dtype) for name, p in model.named_parameters()}
    swap(model, batch())
    assert {name: (id(p), p._version, p.dtype) for name, p in model.named_parameters()} == versions
    assert copy.deepcopy(model) is not model


def test_a_proof_says_what_it_is_at_to_who_listens(capfd: Any) -> None:
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), torch.randn(1, 4, 16)
    heard: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener, logger = logging.handlers.QueueHandler(heard), logging.getLogger("headway")  # type: ignore[arg-type]
    logger.addHandler(listener)
    try:
        swap(model, x)
        assert heard.empty()
        assert capfd.readouterr() == ("", "")
        logger.setLevel(logging.INFO)
        swap(model, x)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(logging.NOTSET)
    messages = [heard.get().getMessage() for _ in range(heard.qsize())]
    assert "proving site 2 of 2: layers.1.self_attn" in messages
    assert "edge deck, 2 heads of 8: strided views" in messages
    assert messages[-1] == "proving the whole model"
