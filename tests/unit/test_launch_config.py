"""Composing, freezing and comparing configurations."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.errors import ConfigError
from planaria.launch import config
from planaria.launch.config import RunConf


def test_defaults_compose_and_survive_freezing(tmp_path):
    conf = config.compose([])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(conf))
    assert config.load(path) == conf


def test_every_key_of_the_groups_is_known_and_every_known_key_is_in_them():
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module(config.CONF_MODULE, version_base=None):
        composed = OmegaConf.to_container(compose("config"))
    assert isinstance(composed, dict)
    assert composed.keys() == {f.name for f in dataclasses.fields(RunConf)}
    for group in ("model", "data", "optim", "checkpoint", "launcher"):
        known = {f.name for f in dataclasses.fields(getattr(RunConf(), group))}
        assert composed[group].keys() == known


def test_overrides_and_group_options():
    conf = config.compose(["steps=7", "optim.lr=0.5", "checkpoint=often", "checkpoint.keep=null"])
    assert (conf.steps, conf.optim.lr) == (7, 0.5)
    assert (conf.checkpoint.every, conf.checkpoint.keep) == (5, None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stepz=3", "steps"),
        ("optim.learning=3", "optim.learning"),
        ("steps=many", "steps"),
        ("steps=0", "steps=0"),
        ("model=enormous", "enormous"),
        ("model.dim=7", "model.dim=7"),
        ("model.width=7", "dim, layers"),
        ("data.batch_size=7", "data.micro_batch_size"),
        ("checkpoint.on_failure=shrug", "fatal, retry, degrade"),
        ("checkpoint.every_seconds=0", "checkpoint.every_seconds"),
        ("checkpoint.adaptive=3", "between 0 and 1"),
        ("checkpoint.on_signal=TERM", "USR1"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every"),
        ("device=tpu", "auto, cpu, cuda"),
        ("name=../x", "name"),
        ("launcher.nnodes=2", "--rdzv"),
        ("launcher.rdzv=nowhere", "HOST:PORT"),
        ("steps=[", "steps"),
        ("steps", "steps"),
        ("launcher.grace_s=0", "launcher.grace_s"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, said):
    with pytest.raises(ConfigError) as caught:
        config.compose([override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_near_miss_is_suggested():
    with pytest.raises(
        ConfigError, match=r"no key optim\.weight_decya; did you mean optim\.weight_decay\?"
    ):
        config.compose(["optim.weight_decya=0"])


def test_a_script_brings_its_own_batches():
    with pytest.raises(ConfigError, match="8 ranks cannot share 4 micro-batches"):
        config.compose(["launcher.nproc=8"])
    conf = config.compose(["launcher.nproc=8"], script=["train.py", "--lr=[1]", "${x}"])
    assert conf.script == ["train.py", "--lr=[1]", "${x}"]


def test_what_is_frozen_is_never_resolved_again(tmp_path):
    conf = RunConf(script=["train.py", r"a\${oc.env:HOME}"])
    conf.data.paths = ["${oc.env:HOME}/text"]
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(conf))
    assert config.load(path) == conf


def test_what_may_change_on_resume_and_what_may_not():
    old = config.compose([])
    free = config.compose(["launcher.nproc=1", "log_every=1", "steps=300", "launcher.grace_s=1"])
    assert config.differences(old, free) == {}
    other = config.compose(["steps=100", "optim.lr=0.5", "seed=1"])
    assert config.differences(old, other) == {
        "steps": (200, 100),
        "optim.lr": (old.optim.lr, 0.5),
        "seed": (0, 1),
    }


def test_a_session_computes_something_else_and_its_ranks_are_free():
    plain = config.compose([])
    assert config.differences(plain, config.compose(["elastic=warm", "elastic.zero_stage=1"])) == {}
    session = config.compose(["elastic=session"])
    assert config.differences(plain, session)["elastic.mode"] == ("off or warm", "session")
    free = ["launcher.nproc=4", "elastic.redundancy=2", "elastic.policy=shrink", "elastic.hang_s=5"]
    assert config.differences(session, config.compose(["elastic=session", *free])) == {}
    other = config.compose(["elastic=session", "elastic.zero_stage=0"])
    assert config.differences(session, other) == {"elastic.zero_stage": (2, 0)}


@pytest.mark.parametrize(
    "override",
    ["elastic.policy=hope", "elastic.zero_stage=3", "elastic.consistency=often",
     "elastic.min_world=0", "elastic.redundancy=-1", "elastic.hang_s=0", "elastic.group=0"],
)  # fmt: skip
def test_what_a_session_cannot_be_is_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        config.compose(["elastic=session", override])


@given(st.sampled_from(sorted(config.flatten(RunConf()))), st.integers(1, 1000))
def test_flatten_names_every_value(key, value):
    conf = RunConf()
    *path, last = key.split(".")
    target = conf
    for name in path:
        target = getattr(target, name)
    object.__setattr__(target, last, value)
    assert config.flatten(conf)[key] == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("node0:29500", ("node0", 29500)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_endpoints(text, parts):
    assert config.parse_endpoint(text) == parts


@pytest.mark.parametrize("text", ["", "node", "node:", ":80", "node:0", "node:65536", "a b:80"])
def test_bad_endpoints(text):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        config.parse_endpoint(text)


@pytest.mark.parametrize(
    "text", ["", "[1]", "a: [", "steps: x", "unknown: 1", "script: 3", "script: []"]
)
def test_a_damaged_frozen_configuration_is_one_error(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        config.load(path)


def test_snapshot_processes_write_only_where_there_are_some():
    conf = config.compose(["checkpoint.writer=snapshot", "elastic=warm"])
    assert conf.checkpoint.writer == "snapshot"
    with pytest.raises(ConfigError, match="elastic=warm"):
        config.compose(["checkpoint.writer=snapshot"])
    with pytest.raises(ConfigError, match=r"checkpoint\.writer"):
        config.compose(["checkpoint.writer=nobody", "elastic=warm"])
