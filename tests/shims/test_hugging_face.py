"""transformers' attn_implementation="flash_attention_2" on the shim: as sdpa, padded and packed, and gone with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fresh
from transformers import LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils

from headway.shims import flash_attn, install, installed, uninstall


def llama(attention: str, **more: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of the shim's functions is called."""
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., Any]:
        real = getattr(flash_attn, name)

        @functools.wraps(real)
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return real(*args, **kwargs)

        return run

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(flash_attn, name, count(name))
    return calls


def agree(run: Callable[[LlamaForCausalLM], torch.Tensor], **more: Any) -> None:
    """Logits and gradients under flash_attention_2 and sdpa."""
    answers = []
    with installed("flash_attn", as_distribution=True):
        for attention in ("flash_attention_2", "sdpa"):
            model = llama(attention, **more)
            assert model.config._attn_implementation == attention
            out = run(model)
            out.square().sum().backward()
            answers.append((out, *(p.grad for p in model.parameters())))
    torch.testing.assert_close(*answers)


IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def test_rows_without_filler(counted: dict[str, int]) -> None:
    agree(lambda model: model(IDS).logits)
    assert counted == {"flash_attn_func": 2}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(counted: dict[str, int], side: str) -> None:
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, slice(0, 4) if side == "left" else slice(5, None)] = 0
    agree(lambda model: model(IDS, attention_mask=real).logits[real.bool()])
    assert counted == {"flash_attn_varlen_func": 2}


def test_packed(counted: dict[str, int]) -> None:
    """Position ids that start anew say where sequences start; sdpa is given them one by one."""
    lengths = (4, 1, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def run(model: LlamaForCausalLM) -> torch.Tensor:
        if model.config._attn_implementation == "sdpa":
            return torch.cat([model(part).logits for part in IDS[:1].split(lengths, 1)], 1)
        return model(IDS[:1], position_ids=positions, use_cache=False).logits

    agree(run)
    assert counted == {"flash_attn_varlen_func": 2}


def test_generating() -> None:
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, :4] = 0
    with installed("flash_attn", as_distribution=True):
        texts = [
            llama(attention).eval().generate(IDS, attention_mask=real, max_new_tokens=8, do_sample=False)
            for attention in ("flash_attention_2", "sdpa")
        ]
    assert torch.equal(*texts)


def test_transformers_is_as_before_without_the_shim() -> None:
    utils = modeling_flash_attention_utils
    row = dict(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2])
    question, loaded = utils.is_flash_attn_2_available, utils._loaded_implementation
    for _ in range(2):
        with pytest.raises(ImportError, match="FlashAttention2"):
            llama("flash_attention_2")
        with installed("flash_attn"), pytest.raises(ImportError, match="FlashAttention2"):
            llama("flash_attention_2")  # nobody asked for a distribution
        with installed("flash_attn", as_distribution=True):
            llama("flash_attention_2")
    assert row == utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    assert (utils.is_flash_attn_2_available, utils._loaded_implementation) == (question, loaded)


def test_transformers_imported_after_the_shim(tmp_path: Path) -> None:
    code = """
from headway import shims
shims.install(as_distribution=True)
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    attn_implementation="flash_attention_2",
)
assert LlamaForCausalLM(config)(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 64)
"""
    status, told = fresh(code, folder=tmp_path)
    assert status == 0, told


def test_uninstall_says_that_models_of_flash_attention_2_stop() -> None:
    def with_(made: str) -> LlamaForCausalLM:
        install("flash_attn", as_distribution=True)
        model = llama(made)
        model(IDS)
        return model

    model = with_("flash_attention_2")
    with pytest.warns(RuntimeWarning, match=r"raise from now on.*set_attn_implementation\('sdpa'\)"):
        uninstall()
    with pytest.raises(ImportError):
        model(IDS)
    model.set_attn_implementation("sdpa")
    model(IDS)
    with_("sdpa")
    uninstall()  # without a word


@pytest.mark.parametrize("option", [[], ["--as-distribution"]])
def test_a_script_is_told_of_the_option_that_transformers_needs(option: list[str], tmp_path: Path) -> None:
    (tmp_path / "hf.py").write_text(
        "from transformers import LlamaConfig, LlamaModel\n"
        "sizes = {'hidden_size': 64, 'intermediate_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 4}\n"
        "LlamaModel(LlamaConfig(vocab_size=64, attn_implementation='flash_attention_2', **sizes))\n"
    )
    run = "import runpy; runpy.run_module('headway.shims', run_name='__main__')"
    status, told = fresh(run, "run", *option, "hf.py", folder=tmp_path)
    assert status == (0 if option else 1), told
    assert told.splitlines()[-1].endswith("run this with --as-distribution") != bool(option)
