"""Methods by name: every name makes its method, settings come as text, and a wrong one says so."""

import re

import pytest

from apb.compress import KeyNorm, QueryAware, SnapKV
from apb.evals.evaluate import method_for
from apb.methods import APB, APE, METHODS, Flash, Method, Ring, Spava, Star, Ulysses, make_method, split_method


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("flash", Flash()),
        ("ring", Ring()),
        ("ring-zigzag", Ring(layout="zigzag")),
        ("ulysses", Ulysses()),
        ("star", Star()),
        ("star:", Star()),
        ("star:anchor=1024", Star(anchor=1024)),
        ("ape", APE()),
        ("ape:prefix=3,temperature=1,scale=0.5", APE(prefix=3, temperature=1.0, scale=0.5)),
        ("apb", APB(compressor=QueryAware())),
        ("apb: anchor = 8 , passing=4", APB(anchor=8, passing=4)),
        ("apb:compressor=snapkv,query_in=after,layout=zigzag",
         APB(compressor=SnapKV(), query_in="after", layout="zigzag")),
        ("apb:split_anchor=true", APB(split_anchor=True)),
        ("spava", Spava()),
        ("spava:anchor=8,passing=4,split_anchor=false", Spava(anchor=8, passing=4)),
        ("ulysses:backend=reference", Ulysses(backend="reference")),
    ],
)  # fmt: skip
def test_a_name_with_settings_makes_the_method(text, made):
    assert make_method(text) == made


def test_settings_may_be_values_or_text_and_those_in_the_text_come_first():
    assert make_method("apb", anchor="8", passing=4, compressor=KeyNorm()) == make_method(
        "apb:anchor=8,passing=4,compressor=key-norm"
    )
    assert make_method("star:anchor=5", anchor=7) == Star(anchor=5)
    assert make_method("star", anchor=None) == Star()
    with pytest.raises(ValueError, match=r"anchor: expected an integer ≥ 0, got 7\.5"):
        make_method("star", anchor=7.5).plan(tokens=20, hosts=2)  # not cut to 7
    assert make_method("ring", backend="sdpa") == Ring(backend="sdpa")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("flash", ("flash", {})),
        ("apb:", ("apb", {})),
        (" apb : layout = zigzag ,, heads=a/b=c.pt,", ("apb", {"layout": "zigzag", "heads": "a/b=c.pt"})),
        ("star:anchor", ("star", {"anchor": ""})),
    ],
)
def test_a_text_is_split_without_a_look_at_what_it_means(text, parts):
    assert split_method(text) == parts


@pytest.mark.parametrize(
    ("text", "tokens", "hosts", "budgets"),
    [
        ("apb:anchor=1/4,passing=1/8", 4096, 4, (256, 128)),
        ("apb:anchor=1/4,passing=1/8,layout=zigzag", 4096, 4, (128, 64)),
        ("apb: anchor = 1/4, passing = 1/8, layout = zigzag", 4096, 4, (128, 64)),
        ("spava:anchor=1/4,passing=1/8", 4096, 4, (128, 64)),
        ("apb:anchor=1/3,passing=0/8", 100, 4, (8, 0)),
        ("apb:anchor=1/64,passing=1/64", 100, 4, (1, 1)),  # 25/64 of a token is not nothing
        ("apb:anchor=7,passing=1/1", 100, 4, (7, 25)),
    ],
)
def test_a_fraction_is_one_of_a_block_and_never_rounds_to_nothing(text, tokens, hosts, budgets):
    method = method_for(text, tokens=tokens, hosts=hosts)
    assert (method.anchor, method.passing) == budgets


@pytest.mark.parametrize("name", METHODS)
def test_what_a_name_promises_is_what_its_method_does(name):
    method = make_method(name, backend="reference")
    assert isinstance(method, Method) and method.backend == "reference"
    assert METHODS[name].one_host == method.one_host
    if method.one_host:
        with pytest.raises(ValueError, match=r"hosts: .* runs on one host, got 2"):
            method.plan(tokens=10, hosts=2)
    else:
        assert method.plan(tokens=10, hosts=2, query=1).hosts == 2
    assert method.exact == (name in ("flash", "ring", "ring-zigzag", "ulysses"))
    if name != "minference":  # its budgets belong to its pattern
        own = set(METHODS[name].settings) - {"heads"}  # the checkpoint of a compressor
        assert all(hasattr(method, setting) for setting in own)


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        ("spiral", {}, f"method: expected one of {', '.join(METHODS)}, got 'spiral'"),
        ("", {}, "method: expected one of flash,"),
        ("Ring", {}, "method: expected one of flash,"),
        ("ring:layout=zigzag", {}, "layout: ring does not know it; it takes no settings"),
        ("flash", {"anchor": 3}, "anchor: flash does not know it; it takes no settings"),
        ("star:passing=3", {}, "passing: star does not know it; it takes anchor"),
        ("ape:anchor=3", {}, "anchor: ape does not know it; it takes prefix, temperature, scale"),
        ("star:anchor=many", {}, "anchor: expected an integer, got 'many'"),
        ("star:anchor=1,anchor=2", {}, "anchor: expected it once, got '1' and '2' in 'star:anchor=1,anchor=2'"),
        ("star:anchor", {}, "anchor: expected anchor=VALUE, got 'anchor'"),
        ("ape:temperature=warm", {}, "temperature: expected a number, got 'warm'"),
        ("ape:temperature=0", {}, "temperature: expected a number > 0, got 0.0"),
        ("ape:prefix=-2", {}, "prefix: expected an integer ≥ 0, got -2"),
        ("apb:compressor=gzip", {}, "compressor: expected one of "),
        ("minference:pattern=star", {}, "pattern: expected one of vertical-slash, a-shape, block-sparse, got 'star'"),
        ("minference:pattern=a-shape,blocks=3", {}, "pattern: a-shape takes sink, local, got blocks"),
        ("minference:vertical=0", {}, "vertical: VerticalSlash takes an integer ≥ 1, got 0"),
        ("apb:anchor=-1", {}, "anchor: expected an integer ≥ 0, got -1"),
        ("apb:split_anchor=yes", {}, "split_anchor: expected true or false, got 'yes'"),
        ("apb", {"split_anchor": 1}, "split_anchor: expected True or False, got 1"),
        ("spava:query_in=anchor", {}, "query_in: expected one of ('prefill', 'after'), got 'anchor'"),
        ("apb", {"passing": "-1"}, "passing: expected an integer ≥ 0, got -1"),
    ],
)
def test_a_wrong_name_or_setting_says_what_would_be_right(text, settings, says):
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        make_method(text, **settings)
    assert len(str(raised.value).splitlines()) == 1
