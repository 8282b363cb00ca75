"""Every provider has a look, a colour a project; the README's picture is of committed rows."""

from pathlib import Path

from agro_train.watch import style
from benchmarks.head import scatter
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.plots import LOOKS, colour, look


def test_every_provider_has_a_look_of_its_own() -> None:
    assert set(PROVIDERS) <= set(LOOKS)
    assert len(set(LOOKS.values())) == len(LOOKS)
    of_ours = {name for name in LOOKS if colour(name) == style.OURS}
    assert of_ours == {name for name in LOOKS if name.startswith("ours")}
    assert look("ours") == {"color": style.OURS, "linestyle": "-"}


def test_scatter_names_every_provider_once(tmp_path: Path) -> None:
    panels = {"a GPU": scatter.gpu_points(), "a CPU": scatter.cpu_points()}
    figure = scatter.draw(panels)
    for axes, points in zip(figure.axes, panels.values(), strict=True):
        assert sorted(text.get_text() for text in axes.texts) == sorted(name for name, *_ in points)
    assert style.save(figure, tmp_path / "scatter.png").stat().st_size > 5000
