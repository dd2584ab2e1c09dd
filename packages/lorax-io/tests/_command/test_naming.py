"""`--rename` changes the names of modules."""

import pytest
from formats_of_files import IN, OUT


def test_rename_changes_the_prefix(shell, files):
    module = "language_model.model.layers.0.self_attn.q_proj"
    files.peft(files.pair(module, OUT, IN), target_modules=[module])
    base = "model.language_model.layers.0.self_attn.q_proj"
    files.base({f"{base}.weight": files.draw(OUT, IN)})
    assert "has no tensor of that name" in shell.fail("verify adapter --base base")
    rename = r"--rename ^language_model\.model\. model.language_model."
    shell.succeed(f"verify adapter --base base {rename}")
    shell.succeed(f"merge adapter --base base --out merged {rename}")
    shell.succeed(f"convert adapter out --to peft {rename}")
    shell.succeed("verify out --base base")
    assert shell(f"diff adapter out {rename}").code == 0
    assert shell("diff adapter out").code == 1


def test_rename_still_reports_missing_tensors(shell, files):
    files.peft(files.pair("lm.layers.0.q_proj", OUT, IN), target_modules=["q_proj"])
    files.base({f"model.lm.layers.{k}.q_proj.weight": files.draw(OUT, IN) for k in range(2)})
    rename = r"--rename ^lm\. model.lm."
    assert "layers.1.q_proj" in shell.fail(f"verify adapter --base base {rename}")


# Options without an effect: the command line, and the option in the message.
UNUSED = [
    ("verify adapter --rename a b", "--rename"),
    ("verify adapter --allow-missing", "--allow-missing"),
    ("convert adapter out --to native --fold-scale", "--fold-scale"),
    ("convert adapter out --to mlx --task-type CAUSAL_LM", "--task-type"),
    ("convert adapter out --to kohya --base-model me/model", "--base-model"),
    ("convert adapter out --to peft --base base", "--base"),
    ("resize adapter out --rank 1 --prefix unet", "--prefix"),
    ("combine adapter adapter --out out --signs total", "--signs"),
    ("combine adapter adapter --out out --method svd --seed 0", "--seed"),
    ("merge adapter --base base --out out --requantize", "--requantize"),
]


@pytest.mark.parametrize(("line", "option"), UNUSED)
def test_options_without_an_effect_raise(shell, files, tmp_path, line, option):
    files.peft(files.pair("a", OUT, IN), target_modules=["a"])
    files.base({"a.weight": files.draw(OUT, IN)})
    assert f"{option}: has no effect" in shell.fail(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rename", ["--rename ( x", r"--rename a \2"])
def test_invalid_rename_pattern_raises(shell, files, rename):
    files.peft(files.pair("a", OUT, IN), target_modules=["a"])
    assert "is not a pattern" in shell.fail(f"convert adapter out --to native {rename}")


def test_rename_to_a_duplicate_name_raises(shell, files):
    files.peft(files.pair("a", OUT, IN) | files.pair("b", OUT, IN), target_modules=["a", "b"])
    assert "renamed" in shell.fail("convert adapter out --to native --rename [ab] c")


@pytest.mark.parametrize(
    "line",
    ["inspect adapter", "convert adapter out --to native", "merge adapter --base base --out out"],
)
def test_rename_without_a_match_warns(shell, files, line):
    files.peft(files.pair("a", OUT, IN), target_modules=["a"])
    files.base({"a.weight": files.draw(OUT, IN)})
    result = shell(f"{line} --rename b c")
    assert result.code == 0
    assert "--rename: no module matches 'b', so nothing was renamed" in result.err
    assert "nothing was renamed" not in shell(f"{line} --rename a a").err
