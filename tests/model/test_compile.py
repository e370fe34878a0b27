"""`--compile`: two graphs whatever is drawn, none broken, recorded in the picture; and what it says where it fails."""

from functools import partialmethod

import pytest
import torch
from tiny import tiny_pipeline
from torch import nn
from torch._dynamo.testing import CompileCounter

from flux_core.errors import UsageError
from flux_core.hooks import Scale, Skip
from flux_core.images.metadata import differences
from flux_core.request.generation import GenerationRequest

FAST = {"num_steps": 3, "width": 48, "height": 32, "force": True}


@pytest.fixture
def compiled(monkeypatch):
    """A function from a backend to a pipeline whose blocks it compiles."""
    torch._dynamo.reset()
    compile = nn.Module.compile

    def make(backend):
        monkeypatch.setattr(nn.Module, "compile", partialmethod(compile, backend=backend))
        return tiny_pipeline(compile=True)

    yield make
    torch._dynamo.reset()


def test_steps_prompts_seeds_and_plans_share_two_graphs(compiled):
    counter = CompileCounter()
    pipeline, plain = compiled(counter), tiny_pipeline()
    assert counter.frame_count == 0
    for prompt, seed, changes in [
        ("a red apple", 1, {}),
        ("a blue car beside a tree", 2, {"guidance": 1.5, "num_steps": 2}),
        ("x", 3, {"plan": [Skip(blocks="layer.1"), Scale(sites="*.gate", value=0.5)]}),
    ]:
        given = {**FAST, **changes}
        images = [one.generate(prompt, seed, **given)[0] for one in (pipeline, plain)]
        assert images[0].tobytes() == images[1].tobytes()  # the counter's backend runs the graph as it is
        assert counter.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_second_size_compiles_once_more_and_a_third_no_more(compiled):
    counter = CompileCounter()
    pipeline = compiled(counter)
    for width, graphs in ((48, 2), (64, 4), (80, 4), (48, 4)):
        pipeline.generate("a red apple", 1, **{**FAST, "width": width})
        assert counter.frame_count == graphs


def test_the_picture_says_so(compiled):
    request = GenerationRequest(prompt="x", seed=1, **FAST)
    drawn = compiled("eager").complete(request)
    plain = tiny_pipeline().complete(request)
    assert (drawn.compiled, plain.compiled) == (True, False)
    assert differences(drawn, plain) == ["it was drawn with --compile"]
    assert differences(plain, drawn) == ["it was drawn without --compile"]
    assert differences(drawn, drawn) == []


def test_what_cannot_be_compiled_is_told_in_a_line(compiled):
    def broken(graph, inputs):
        raise OSError("no working compiler\nsecond line")

    with pytest.raises(UsageError, match=r"^--compile does not work here: .*no working compiler.*Next: leave it out$"):
        compiled(broken).generate("x", 1, **FAST)


def test_other_errors_stay_what_they_are(compiled):
    pipeline = compiled("eager")
    with pytest.raises(UsageError, match="is for flux-dev"):
        pipeline.draw(GenerationRequest(name="flux-dev", prompt="x", seed=1))
