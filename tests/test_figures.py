"""tools/figures.py: a picture for each figure of a finished chain, the reason for those that are not run."""

import contract

import argparse

import numpy as np
from conftest import CLASSES, load

figures = load("tools/figures.py")


def test_every_figure_of_a_chain(place, videomae):
    """What the sets of Fig. 2, 3 and 5 are is told by their names: here all are as small as can be."""
    assert place.must("tools/figures.py", 2).count("not run: ") == 11  # not fig12
    place.must("03", "--save-latents", "--redo")
    place.must("02", "--cluster", "dummy-video")
    words = ("--draws", 1, "--save-latents")
    for strength, name in figures.STRENGTHS.items():
        place.must("03", "--sampler", "knoise", "--strength", strength, "--name", name, "--steps", 4, *words)
    place.must("03", "--sampler", "naive", *words)
    place.must("03", "--decay", "none", "--name", "gvd-no-decay", *words)
    place.must("05", "--train-on", "full", "--save", "--repeats", 1)
    place.must("tools/metrics.py", 2, "--teacher", videomae, "--sets", "gvd")
    place.must("tools/tables.py")
    place.must("tools/paper_tables.py")
    text = place.must("tools/figures.py", 2)
    folder, missing = place.work / "demo/tables", {"fig7d", "fig9", "fig10"}
    drawn = {path.stem for path in folder.glob("*.png")}
    assert drawn == {*figures.BARS, "fig2", "fig3", "fig5", "fig12"} - missing, text
    assert all(f"{name} not run: " in text for name in missing)

    rows = {(row["set"], row["prototypes"]): row for row in contract.read(folder / "fig5.csv")}
    found = []
    for label in CLASSES:
        centre = np.load(place.work / f"demo/02_prototypes/ipc2/direct/{label}.npy")
        for k in range(2):
            z = np.load(place.work / f"demo/03_samples/ipc2/gvd/{label}/{k}_0.npy").astype(float)
            found.append(np.sqrt(((z - centre[k]) ** 2).mean()))
    row, wanted = rows["gvd", "direct"], (np.mean(found), np.std(found, ddof=1))
    assert [float(row[key]) for key in ("mean", "std")] == [round(value, 6) for value in wanted]
    assert len(rows) == 8 and rows["naive", "direct"]["n"] == "4"
    owner = [row["set"] for row in contract.read(folder / "fig3.csv")]
    assert owner == ["real"] * 10 + ["gvd"] * 4

    first = {path.name: path.read_bytes() for path in folder.glob("fig*.*")}
    place.must("tools/figures.py", 2)
    assert first == {path.name: path.read_bytes() for path in folder.glob("fig*.*")}


def test_bars_stand_where_the_table_says(tmp_path):
    titles = ("row", "column", "value", "std", "note", "paper")
    rows = [("a", "x", 3, 1, "", ""), ("b", "x", "", "", "no such set", 4), ("a", "y", 5, "", "", "")]
    contract.save(tmp_path / "demo/tables/fig7a.csv", [titles, *rows, ("b", "y", 6, "", "", "")])
    contract.save(tmp_path / "demo/tables/fig7a.md", b"| Title | x |\n")
    args = argparse.Namespace(work_dir=tmp_path, dataset="demo")
    (axis,) = figures.draw_bars(args, "fig7a").axes
    assert sorted(bar.get_height() for bar in axis.patches) == [0, 3, 5, 6]
    assert [text.get_text().strip() for text in axis.texts] == ["not run"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
