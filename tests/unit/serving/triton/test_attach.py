"""attach and detach on disk: what is written, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fides_plugins.bundle import InputSpec
from fides_plugins.cli import app
from fides_plugins.errors import FidesError, ServerError
from fides_plugins.serving.triton.attach import MANIFEST_FILE, attach, detach
from fides_plugins.serving.triton.config import parse_text, without_name
from fides_plugins.serving.triton.plan import AttachOptions
from tests.support.triton_models import STRANGER_CONFIG, image_bundle, stranger_repository, tree_digest

pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_bundle(tmp_path_factory.mktemp("attach") / "bundle")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return stranger_repository(tmp_path / "repository")


def test_attach_edits_nothing_and_detach_restores_the_tree(repository: Path, bundle: Path) -> None:
    before = tree_digest(repository)
    own = {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()}
    attached = attach(repository, "flowers", AttachOptions(bundle, settings={"mode": "flag"}))
    assert attached.flag == "--model-config-name=fides"
    assert all(p.read_bytes() == data for p, data in own.items())
    assert (repository / "flowers__base" / "3" / "net.onnx").read_bytes()
    assert tree_digest(repository) != before
    _, left = detach(repository, "flowers")
    assert left == []
    assert tree_digest(repository) == before


def test_the_base_keeps_comments_and_loses_only_its_name(repository: Path, bundle: Path) -> None:
    attach(repository, "flowers", AttachOptions(bundle))
    text = (repository / "flowers__base" / "config.pbtxt").read_text()
    assert "# Served since 2023" in text
    assert 'name: "flowers"' not in text
    config = parse_text(text, "base")
    assert config.name == ""
    assert [t.name for t in config.input] == ["pixels_in"]
    assert config.model_warmup[0].name == "one"


def test_the_ensemble_declares_exactly_the_original_tensors(repository: Path, bundle: Path) -> None:
    attach(repository, "flowers", AttachOptions(bundle))
    config = parse_text((repository / "flowers" / "configs" / "fides.pbtxt").read_text(), "ensemble")
    assert [o.name for o in config.output] == ["scores"]
    assert config.output[0].label_filename == "flower_labels.txt"
    assert list(config.version_policy.specific.versions) == [3]
    # Verification first: see the integration test of a service that answers with errors.
    assert [(s.model_name, s.model_version) for s in config.ensemble_scheduling.step] == [
        ("flowers__fides_verify", 1),
        ("flowers__base", 3),
        ("flowers__fides_validate", 1),
    ]
    assert not config.HasField("dynamic_batching")
    verdict = parse_text((repository / "flowers__fides" / "config.pbtxt").read_text(), "ensemble")
    assert verdict.output[0].name == "scores"
    assert {"FIDES_STATUS", "FIDES_SCORE", "FIDES_LABEL", "FIDES_PROBABILITIES"} <= {o.name for o in verdict.output}


def test_every_label_file_is_found_wherever_it_lies(tmp_path: Path, bundle: Path) -> None:
    aux = '{ name: "aux" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "aux/deep/a.txt" }, {'
    config = _replace("output [ {", f"output [ {aux}").replace("flower_labels.txt", "labels/l.txt")
    repository = stranger_repository(tmp_path / "repository", config)
    for name in ("labels/l.txt", "aux/deep/a.txt"):
        (repository / "flowers" / name).parent.mkdir(parents=True)
        (repository / "flowers" / name).write_text("a\n")
    before = tree_digest(repository)
    attach(repository, "flowers", AttachOptions(bundle))
    assert [p for p in repository.rglob("*") if p.is_symlink() and not p.exists()] == []
    for folder in ("flowers", "flowers__base", "flowers__fides", "flowers__fides_validate", "flowers__fides_fallback"):
        assert (repository / folder / "labels" / "l.txt").read_text() == "a\n"
    assert (repository / "flowers__fides" / "aux" / "deep" / "a.txt").is_file()
    detach(repository, "flowers")
    assert tree_digest(repository) == before


def test_under_another_name_nothing_is_linked(repository: Path, bundle: Path) -> None:
    before = tree_digest(repository)
    attached = attach(repository, "flowers", AttachOptions(bundle, serve_as="safe"))
    assert attached.flag == ""
    assert attached.base == "flowers"
    assert not (repository / "safe__base").exists()
    assert (repository / "safe" / "3").is_dir()
    detach(repository, "safe")
    assert tree_digest(repository) == before


def test_a_file_that_somebody_added_is_kept_and_named(repository: Path, bundle: Path) -> None:
    attach(repository, "flowers", AttachOptions(bundle))
    (repository / "flowers__fides" / "notes.txt").write_text("mine")
    _, left = detach(repository, "flowers")
    assert left == ["flowers__fides"]
    assert (repository / "flowers__fides" / "notes.txt").read_text() == "mine"


def test_a_file_that_somebody_changed_is_named_and_needs_force(repository: Path, bundle: Path) -> None:
    before = tree_digest(repository)
    attach(repository, "flowers", AttachOptions(bundle))
    config = repository / "flowers__fides_verify" / "config.pbtxt"
    config.write_text(config.read_text() + "# mine\n")
    label = repository / "flowers__fides" / "flower_labels.txt"
    label.unlink()
    label.write_text("mine")
    attached = tree_digest(repository)
    with pytest.raises(ServerError, match=r"flowers__fides_verify/config\.pbtxt, flowers__fides/flower_.*--force"):
        detach(repository, "flowers")
    assert tree_digest(repository) == attached
    assert detach(repository, "flowers", force=True)[1] == []
    assert tree_digest(repository) == before


def test_without_its_list_detach_says_what_to_remove(repository: Path, bundle: Path) -> None:
    attach(repository, "flowers", AttachOptions(bundle))
    (repository / "flowers__fides" / MANIFEST_FILE).unlink()
    with pytest.raises(
        ServerError, match=r"fides-attach\.json.*missing.*by hand.*flowers__base.*flowers/configs/fides"
    ):
        detach(repository, "flowers")


def _replace(old: str, new: str) -> str:
    assert old in STRANGER_CONFIG
    return STRANGER_CONFIG.replace(old, new)


def _whole(input_dims: str, output_dims: str) -> str:
    """A model that declares its tensors whole."""
    return (
        f'backend: "python" max_batch_size: 0 input [ {{ name: "pixels_in" data_type: TYPE_FP32 '
        f'dims: [ {input_dims} ] }} ] output [ {{ name: "scores" data_type: TYPE_FP32 dims: [ {output_dims} ] }} ]'
    )


BATCHING = "dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }\n"
OF_BYTES = _replace("TYPE_FP32 dims: [ 1, 8, 8 ] } ]\noutput", "TYPE_STRING dims: [ 1 ] } ]\noutput")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        pytest.param(
            STRANGER_CONFIG + "model_transaction_policy { decoupled: true }\n", "decoupled", id="answers in parts"
        ),
        pytest.param(
            _replace("latest { num_versions: 1 }", "all { }"),
            r"serves the versions \[1, 3\].*--version",
            id="several versions",
        ),
        pytest.param(_replace("dims: [ 10 ] label", "dims: [ 11 ] label"), "no class output", id="eleven classes"),
        pytest.param(
            _replace('"scores" data_type: TYPE_FP32', '"scores" data_type: TYPE_INT64'),
            "no class output",
            id="labels instead of scores",
        ),
        pytest.param(
            _replace("dims: [ 1, 8, 8 ] } ]\noutput", "dims: [ 3, 8, 8 ] } ]\noutput"),
            "takes .1, 8, 8.",
            id="another shape",
        ),
        pytest.param(OF_BYTES, "decoder", id="bytes"),
        pytest.param('backend: "python"\n', "--from-server", id="no tensors"),
        pytest.param("input [ {", "not a valid model configuration", id="no configuration"),
        pytest.param(
            _replace("output [ {", 'output [ { name: "aux" data_type: TYPE_FP32 dims: [ 10 ] }, {'),
            r"Several outputs.*--output",
            id="two outputs",
        ),
        pytest.param(
            _replace("input [ {", 'input [ { name: "mask" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] }, {'),
            r"inputs .*--input",
            id="two inputs",
        ),
        pytest.param(
            _replace(BATCHING, "sequence_batching { }\n"),
            "sequence_batching.*Protect a model without it",
            id="sequences",
        ),
        pytest.param(
            _replace(BATCHING, "dynamic_batching { default_queue_policy { max_queue_size: 1 } }\n"),
            "max_queue_size.*timeout_action: REJECT",
            id="a queue that can be full",
        ),
        pytest.param(
            _replace(
                BATCHING,
                "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
                "priority_queue_policy { key: 2 value { max_queue_size: 8 } } }\n",
            ),
            "max_queue_size",
            id="a queue of a priority that can be full",
        ),
        pytest.param(
            _whole("1, 8, 8", "1, 10"), "takes .1, 8, 8. after the row axis.*both", id="rows in the output only"
        ),
        pytest.param(_whole("1, 1, 8, 8", "10"), "takes .1, 8, 8. and no row axis.*both", id="rows in the input only"),
        pytest.param(_replace('name: "scores"', 'name: "pixels_in"'), "cannot tell them apart", id="one name twice"),
    ],
)
def test_what_cannot_be_protected_is_refused_and_leaves_nothing(
    tmp_path: Path, bundle: Path, config: str, match: str
) -> None:
    repository = stranger_repository(tmp_path / "repository", config)
    before = tree_digest(repository)
    with pytest.raises(FidesError, match=match):
        attach(repository, "flowers", AttachOptions(bundle))
    assert tree_digest(repository) == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "watch"}, "mode"),
        ({"moode": "flag"}, "Did you mean 'mode'"),
        ({"false_alarm_rate": "0.0001"}, "calibration rows"),
        ({"plugins.load": "no_such_module"}, "no module"),
        ({"output_kind": "probabilities"}, "--output-kind"),
        ({"bundle": "other"}, "--bundle"),
        ({"input": "pixels_in"}, "--input"),
    ],
)
def test_wrong_settings_leave_nothing(repository: Path, bundle: Path, settings: dict[str, str], match: str) -> None:
    before = tree_digest(repository)
    with pytest.raises(FidesError, match=match):
        attach(repository, "flowers", AttachOptions(bundle, settings=settings))
    assert tree_digest(repository) == before


def test_a_service_name_that_was_set_is_kept(repository: Path, bundle: Path) -> None:
    attach(repository, "flowers", AttachOptions(bundle, settings={"service_name": "flowers of Berlin"}))
    text = (repository / "flowers__fides_validate" / "config.pbtxt").read_text()
    assert 'key: "fides.service_name" value { string_value: "flowers of Berlin" }' in text


@pytest.mark.parametrize(
    ("config", "decode", "match"),
    [
        (OF_BYTES, "image:size=8", "decoder 'image:size=8'"),
        (OF_BYTES, "image:size=224x224,mode=L", r"makes rows of the shape .1, 224, 224.*takes .1, 8, 8."),
        (OF_BYTES, "image:size=8x8", r"makes rows of the shape .3, 8, 8."),
        (OF_BYTES, "image:size=8x8,mode=L,mean=0/0/0", r"3 mean.*for 1 channel"),
        (STRANGER_CONFIG, "image:size=8x8,mode=L", "Leave --decode out"),
    ],
    ids=["no size", "another size", "another mode", "three means", "no bytes"],
)
def test_a_decoder_that_does_not_fit_leaves_nothing(
    tmp_path: Path, bundle: Path, config: str, decode: str, match: str
) -> None:
    repository = stranger_repository(tmp_path / "repository", config)
    before = tree_digest(repository)
    with pytest.raises(FidesError, match=match):
        attach(repository, "flowers", AttachOptions(bundle, decode=decode))
    assert tree_digest(repository) == before


def test_a_repository_that_cannot_be_written_to_the_end_is_cleaned(
    repository: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree_digest(repository)

    def no_links(*args: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("os.symlink", no_links)
    with pytest.raises(ServerError, match="No space left"):
        attach(repository, "flowers", AttachOptions(bundle))
    assert tree_digest(repository) == before


def test_attaching_twice_or_over_other_files_is_refused(repository: Path, bundle: Path) -> None:
    attach(repository, "flowers", AttachOptions(bundle))
    with pytest.raises(ServerError, match=r"already has flowers__base.*detach"):
        attach(repository, "flowers", AttachOptions(bundle))
    with pytest.raises(ServerError, match=r"no model 'roses'.*flowers"):
        attach(repository, "roses", AttachOptions(bundle))
    with pytest.raises(ServerError, match="not a model name"):
        attach(repository, "../flowers", AttachOptions(bundle))


def test_detach_needs_a_sound_manifest(repository: Path, bundle: Path) -> None:
    with pytest.raises(ServerError, match="not attached"):
        detach(repository, "flowers")
    attach(repository, "flowers", AttachOptions(bundle))
    manifest = repository / "flowers__fides" / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    content["files"]["../outside"] = "00"
    manifest.write_text(json.dumps(content))
    with pytest.raises(ServerError, match="outside the repository"):
        detach(repository, "flowers")


def test_float16_is_converted_and_said(tmp_path: Path, bundle: Path) -> None:
    config = STRANGER_CONFIG.replace(
        "TYPE_FP32 dims: [ 1, 8, 8 ] } ]\noutput", "TYPE_FP16 dims: [ 1, 8, 8 ] } ]\noutput"
    )
    repository = stranger_repository(tmp_path / "repository", config)
    attached = attach(repository, "flowers", AttachOptions(bundle))
    assert any("converted to float32" in note for note in attached.notes)
    assert (
        'key: "fides_step.cast" value { string_value: "float32" }'
        in (repository / "flowers__fides_verify" / "config.pbtxt").read_text()
    )


def test_a_pinned_version_is_protected_alone(tmp_path: Path, bundle: Path) -> None:
    repository = stranger_repository(tmp_path / "repository", _replace("latest { num_versions: 1 }", "all { }"))
    attach(repository, "flowers", AttachOptions(bundle, version=1))
    config = parse_text((repository / "flowers" / "configs" / "fides.pbtxt").read_text(), "ensemble")
    assert config.ensemble_scheduling.step[1].model_version == 1
    with pytest.raises(ServerError, match="Version 2"):
        attach(repository, "flowers", AttachOptions(bundle, version=2, serve_as="other"))


def test_names_in_comments_strings_and_tensors_stay() -> None:
    rest = ' # name: "m"\ninput { name: "m" }\nparameters { key: "name" value { string_value: "}{" } }\nname_x: 1\n'
    assert without_name('name: "m"' + rest) == rest


def test_the_input_of_another_bundle_is_refused(repository: Path, tmp_path: Path) -> None:
    other = image_bundle(tmp_path / "other", input=InputSpec(name="image", dtype="float32", shape=(None, 3, 32, 32)))
    with pytest.raises(ServerError, match="Use the bundle that was made for this model"):
        attach(repository, "flowers", AttachOptions(other))


def test_the_command_line_attaches_and_detaches(repository: Path, bundle: Path) -> None:
    before = tree_digest(repository)
    run = CliRunner().invoke
    command = ["attach", "triton", str(repository), "flowers", "--bundle", str(bundle), "--mode", "flag"]
    done = run(app, [*command, "--set", "false_alarm_rate=0.02", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert answer["flag"] == "--model-config-name=fides"
    assert answer["with_verdict"] == "flowers__fides"
    config = (repository / "flowers__fides_validate" / "config.pbtxt").read_text()
    assert 'key: "fides.false_alarm_rate" value { string_value: "0.02" }' in config
    assert 'key: "fides.mode" value { string_value: "flag" }' in config
    undone = run(app, ["detach", "triton", str(repository), "flowers", "--json"])
    assert json.loads(undone.output)["removed"] == answer["written"]
    assert tree_digest(repository) == before
    refused = run(app, [*command, "--takeover", "--as", "other"])
    assert isinstance(refused.exception, FidesError)
    assert tree_digest(repository) == before
