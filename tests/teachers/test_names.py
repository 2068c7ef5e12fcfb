"""Names: every alias is a real timm tag, and a wrong name leads to the right one."""

from pathlib import Path

import pytest
import timm

from scalekd import students, teachers
from scalekd.errors import UsageError
from scalekd.models.names import nearest_names
from scalekd.teachers import resolve_model_name


def test_every_alias_names_published_weights() -> None:
    published = {*timm.list_models(pretrained=True), "mixer_s16_224", "mixer_b14_224"}
    assert set(teachers.ALIASES.values()) <= published
    assert set(students.ALIASES.values()) <= published


@pytest.mark.parametrize(
    ("alias", "full"),
    [
        ("swin_s", "swin_small_patch4_window7_224.ms_in1k"),
        ("swin_b", "swin_base_patch4_window7_224.ms_in22k_ft_in1k"),
        ("swin_l", "swin_large_patch4_window7_224.ms_in22k_ft_in1k"),
        ("beit_l", "beit_large_patch16_224.in22k_ft_in22k_in1k"),
    ],
)
def test_aliases_of_the_paper_expand_to_its_weights(alias: str, full: str) -> None:
    assert resolve_model_name(alias) == (full, f"{alias} stands for {full}")


def test_a_full_name_needs_no_note() -> None:
    name = "vit_large_patch16_224.augreg_in21k_ft_in1k"
    assert resolve_model_name(name) == (name, None)


def test_an_architecture_gets_timms_default_tag_and_a_note() -> None:
    resolved, note = resolve_model_name("vit_large_patch16_224")
    assert resolved == "vit_large_patch16_224.augreg_in21k_ft_in1k"
    assert note is not None
    assert resolved in note


def test_a_renamed_model_leads_to_its_new_name() -> None:
    resolved, note = resolve_model_name("swin_base_patch4_window7_224_in22k")
    assert resolved == "swin_base_patch4_window7_224.ms_in22k"
    assert note is not None


def test_an_architecture_without_weights_keeps_its_name() -> None:
    assert resolve_model_name("davit_giant") == ("davit_giant", None)


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [
        ("swinl", "swin_l"),
        ("swin_large_patch4_window7", "swin_large_patch4_window7_224"),
        ("dinov2_larg", "dinov2_l"),
        ("beit_l.in1k", "beit_l"),
        ("vit_large_patch16_224.nonsense", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
        ("hf-hub:resnet50", "hf-hub:owner/name"),
        ("local-dir:/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("no/such/folder", "timm has no model"),
        ("", "timm has no model"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(wrong: str, suggested: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolve_model_name(wrong)
    assert suggested in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_may_be_relative_or_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "best"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    wanted = f"local-dir:{folder}"
    for name in ("local-dir:runs/best", "local-dir:./runs/best", f"local-dir:{folder}"):
        assert resolve_model_name(name) == (wanted, None)
    resolved, note = resolve_model_name("runs/best")
    assert resolved == wanted
    assert note is not None


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        resolve_model_name(f"local-dir:{tmp_path}")


def test_nearest_names_puts_the_closest_first_and_ends() -> None:
    names = ["resnet18", "resnet34", "resnet50", "resnet50d", "resnet101", "resnet152", "vgg11"]
    near = nearest_names("resnet5O", names)
    assert near[0] == "resnet50"
    assert len(near) <= 5
    assert "vgg11" not in near
