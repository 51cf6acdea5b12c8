"""The page as text: whole, self-contained, and with every name escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from report.made import failed, named, real

from headway.report import page

VOID = {"meta", "link", "input", "br", "wbr", "hr", "img"}
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`><svg onload=alert(3)>&<!--"


class Reader(HTMLParser):
    """Tags in order, with what stands in them, and whether each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("report", [real, failed, lambda: named(ATTACK)], ids=["real", "failed", "named"])
def test_is_well_formed(report: object) -> None:
    assert Reader(page(report())).open == []  # type: ignore[operator]


def test_asks_for_nothing_from_elsewhere() -> None:
    text = page(real())
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"//[^\n]*\n", "", text.partition("<script>")[0]))
    reader = Reader(text)
    assert {attrs.get("src") for _, attrs in reader.tags} == {None}
    assert [attrs["href"] for _, attrs in reader.tags if "href" in attrs] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 200_000


def test_its_policy_knows_its_script() -> None:
    text = page(real())
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for tag, a in Reader(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{known}'" in policy


def test_every_name_is_escaped() -> None:
    reader, plain = Reader(page(named(ATTACK))), Reader(page(real()))
    assert ATTACK in reader.text
    assert [tag for tag, _ in reader.tags if tag == "script"] == ["script"]
    assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in plain.tags} | {"ul", "li"}
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]


def test_says_all() -> None:
    report, text = real(), Reader(page(real())).text
    assert report.certificate is not None
    for word in (
        "Proven: 2 of 3 sites swapped",
        "got", "takes", "remedy", "move q, k and v to cuda",
        "did not run with the example",
        "faster: 2.00x", "no gain: 1.00x",
        *(card.case for card in report.certificate.deck),
        *(picture.mask for picture in report.pictures),
        report.certificate.facts["versions"]["torch"],
        "headway try mixed",
    ):  # fmt: skip
        assert word in re.sub(r"\n", "", text), word


def test_a_failure_stands_on_top() -> None:
    text = Reader(page(failed())).text
    assert text.index("Not proven") < text.index("bad: gradient of input 0 errs") < text.index("Census")
