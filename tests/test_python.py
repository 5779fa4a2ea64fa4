"""The Python interface: typed functions over objects, one code path with the YAML, and results."""

from __future__ import annotations

import dataclasses
import doctest
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import pytest
import torch
import yaml

import rlhf
from rlhf import plugins
from rlhf.api import inputs, training
from rlhf.api.options import EvaluationOptions, OfflineOptions, OnlineOptions, RewardOptions
from rlhf.api.results import TextPolicy
from rlhf.cli.main import main
from rlhf.config.evaluate import EvaluateConfig
from rlhf.config.offline import OfflineConfig
from rlhf.config.online import OnlineConfig, OptimizerSpec
from rlhf.config.reward import RewardConfig
from rlhf.envs.core import FreeText
from rlhf.errors import UserError
from rlhf.reward_models import as_reward, build
from tests.helpers.hub_server import HubServer
from tests.helpers.training import (
    assert_same_run,
    judge,
    metrics_of,
    online_tree,
    pair_rows,
    same,
    sft_rows,
    tensors_of,
    weights_of,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = [name for name in rlhf.__all__ if name in vars(training) and name != "Run"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a cache folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "work"


def test_there_is_a_function_for_each_training_command():
    from rlhf.cli.table import COMMANDS

    names = {"reward": "train_reward", "reinforce++": "reinforce_plus_plus"}
    names["reinforce++-baseline"] = "reinforce_plus_plus_baseline"
    trained = [
        row.name for row in COMMANDS.groups["Training (each command writes a run directory)"]
    ]
    assert {names.get(name, name) for name in trained} == {*FUNCTIONS} - {"train"}


PUBLIC = [(rlhf, name) for name in rlhf.__all__]
PUBLIC += [(plugins, name) for name in plugins.__all__ if name not in rlhf.__all__]


@pytest.mark.parametrize(
    ("module", "name"), [case for case in PUBLIC if case[1] != "PLUGIN_API"], ids=lambda x: str(x)
)
def test_the_example_of_a_public_name_runs(module, name, capsys):
    """Every public function and class has an example in its docstring."""
    text = getattr(module, name).__doc__
    example = doctest.DocTestParser().get_doctest(text, {"rlhf": rlhf}, name, None, 0)
    assert any(line.want for line in example.examples), "an example shows a result"
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, capsys.readouterr().out


def test_the_methods_of_results_have_a_docstring():
    for cls in (rlhf.Run, rlhf.Callback, rlhf.TrainingEvent, rlhf.LivePlot):
        methods = {k: v for k, v in vars(cls).items() if callable(v) and not k.startswith("_")}
        assert all(method.__doc__ for method in methods.values())


@pytest.mark.parametrize(
    ("options", "config", "extra"),
    [
        (OnlineOptions, OnlineConfig, {"tokenizer", "lora", "prompts"}),
        (OfflineOptions, OfflineConfig, {"tokenizer", "lora"}),
        (RewardOptions, RewardConfig, {"tokenizer", "lora"}),
        (EvaluationOptions, EvaluateConfig, {"prompts"}),
    ],
)
def test_the_arguments_are_the_keys_of_the_configuration(options, config, extra):
    keys = {field.name for field in dataclasses.fields(config)}
    assert set(typing.get_type_hints(options)) == keys | extra


def test_the_yaml_is_the_same_call(folder, echo_model):
    """The recorded configuration, its file on the command line, and the call: equal to the bit."""
    tree = online_tree(folder / "yaml", echo_model, num_steps=2)
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    assert main(["ppo", "--config", "c.yaml"]) == 0
    called = rlhf.ppo(
        model=echo_model,
        env={"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
        rewards=[judge],
        rollout={"max_new_tokens": 3},
        optimizer=OptimizerSpec(learning_rate=1e-3),
        evaluation={"episodes": 4},
        num_steps=2,
        episodes_per_step=8,
        save_every=1,
        output_dir="called",
    )
    assert_same_run(folder / "yaml", called.directory)
    config = rlhf.Run("yaml").config
    assert called.config["rewards"] == [{**config["rewards"][0], "name": "judge"}]
    config["rewards"] = called.config["rewards"]
    assert called.config == config
    assert called.config["algorithm"]["num_epochs"] == 4
    overridden = rlhf.ppo("c.yaml", num_steps=1, output_dir="shorter")
    assert overridden.config["num_steps"] == 1


class Digits(gym.Env):
    """Pays 1 for the letter in the observation."""

    made: ClassVar[int] = 0

    def __init__(self, letter: str = "a") -> None:
        self.observation_space, self.action_space = FreeText(), FreeText()
        self.letter = letter

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"Write {self.letter}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", float(self.letter in action), True, False, {}


ENVIRONMENTS = {
    "id": lambda: "text/Echo-v0",
    "class": lambda: Digits,
    "factory": lambda: lambda: Digits("b"),
    "instance": lambda: Digits("c"),
    "made": lambda: gym.make("rlhf.envs:text/Echo-v0"),
}


@pytest.mark.parametrize("form", ENVIRONMENTS)
def test_forms_of_an_environment(form, echo_model):
    run = rlhf.rloo(
        model=echo_model,
        env=ENVIRONMENTS[form](),
        num_steps=1,
        episodes_per_step=8,
        rollout={"max_new_tokens": 2},
        evaluation={"episodes": 4},
    )
    assert run.finished
    texts = {row["messages"][-2]["content"] for _, row in run.samples.iterrows()}
    expected = {"class": "Write a", "factory": "Write b", "instance": "Write c"}
    if form in expected:
        assert texts == {expected[form]}


def rows_as(form: str, path: Path) -> Any:
    rows = sft_rows()
    if form == "path":
        return write_rows(path / "rows.jsonl", rows)
    if form == "dataset":
        import datasets

        return datasets.Dataset.from_list(rows)
    if form == "frame":
        import pandas as pd

        return pd.DataFrame(rows)
    if form == "sources":
        return [{"path": str(write_rows(path / "a.jsonl", rows[:16]))}, rows[16:]]
    return rows


@pytest.mark.parametrize("form", ["path", "rows", "dataset", "frame", "sources"])
def test_forms_of_data_train_the_same_model(form, folder, echo_model):
    options: dict[str, Any] = {"max_length": 48, "batch_size": 8, "evaluations": 1}
    options |= {"trainer": {"max_steps": 2, "learning_rate": 1e-2}, "model": echo_model}
    run = rlhf.sft(data=rows_as(form, folder), **options, output_dir=f"runs/{form}")
    if form == "sources":  # another order
        assert run.finished
        return
    reference = rlhf.sft(data=rows_as("path", folder), **options, output_dir="runs/reference")
    assert same(weights_of(run.directory), weights_of(reference.directory))


def test_a_loaded_model_is_not_changed(echo_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(echo_model)
    tokenizer = AutoTokenizer.from_pretrained(echo_model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    options: dict[str, Any] = {"data": sft_rows(), "max_length": 48, "evaluations": 1}
    options["trainer"] = {"max_steps": 2, "learning_rate": 1e-2}
    loaded = rlhf.sft(model=model, tokenizer=tokenizer, **options, output_dir="loaded")
    folder = rlhf.sft(model=echo_model, **options, output_dir="folder")
    assert same(weights_of(loaded.directory), weights_of(folder.directory))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    saved = Path(loaded.config["model"]["path"])
    assert same(tensors_of(saved), tensors_of(echo_model))
    again = rlhf.sft(model=model, tokenizer=tokenizer, **options, output_dir="loaded", resume=True)
    assert again.config["model"] == loaded.config["model"]


def test_a_peft_configuration_is_converted():
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    assert inputs.to_lora_config(config) == {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": False,
        "use_rslora": False,
    }
    assert "target_modules" not in inputs.to_lora_config(LoraConfig(target_modules="all-linear"))
    with pytest.raises(UserError, match="lora: bias of PEFT's LoraConfig is not supported"):
        inputs.to_lora_config(LoraConfig(bias="all"))


def test_lora_trains_only_adapters(echo_model):
    from peft import LoraConfig

    run = rlhf.sft(
        model=echo_model,
        lora=LoraConfig(r=2),
        data=sft_rows(),
        max_length=48,
        trainer={"max_steps": 1},
    )
    assert (run.model_path / "adapter_config.json").exists()


def test_a_local_reward_is_resumed_only_with_the_same_source(echo_model):
    def options() -> dict[str, Any]:
        tree = {"model": echo_model, "env": "text/Echo-v0", "num_steps": 1}
        return tree | {"episodes_per_step": 8, "evaluation": {"episodes": 4}}

    def score(conversations):
        return [1.0 for _ in conversations]

    run = rlhf.rloo(**options(), rewards=score)
    assert run.config["rewards"] == [
        {"kind": "function", "path": "object:rewards.0.score", "name": "score"}
    ]
    rlhf.rloo(**options(), rewards=score, resume=True)

    def score(conversations):
        return [2.0 for _ in conversations]

    with pytest.raises(UserError, match=r"the content of rewards.0.path .* has changed"):
        rlhf.rloo(**options(), rewards=score, resume=True)
    words = [sys.executable, "-m", "rlhf", "rloo", "--config", "runs/rloo/config.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--output_dir", "elsewhere"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "object of a Python program" in done.stderr


def test_rewards_and_models_of_earlier_runs(echo_model):
    reward = rlhf.train_reward(
        model=echo_model, data=pair_rows(), max_length=48, trainer={"max_steps": 2}
    )
    conversation = [
        {"role": "user", "content": "Repeat"},
        {"role": "assistant", "content": "stone"},
    ]
    assert len(reward.reward([conversation])) == 1
    with pytest.raises(UserError, match=r"use Run\.reward"):
        _ = reward.policy
    run = rlhf.online_dpo(
        model=echo_model,
        prompts=[{"prompt": f"Repeat: {i}"} for i in range(20)],
        rewards=[reward, {"kind": "function", "path": judge, "weight": 0.5}, "length"],
        num_steps=1,
        episodes_per_step=8,
        evaluation={"episodes": 4},
        rollout={"max_new_tokens": 3},
    )
    assert [spec["kind"] for spec in run.config["rewards"]] == ["trained", "function", "length"]
    assert run.config["rewards"][1]["weight"] == 0.5
    texts = run.policy.generate(["a", "b"], samples=2, max_new_tokens=3, seed=1)
    assert len(texts) == 4
    assert texts == run.policy.generate(["a", "b"], samples=2, max_new_tokens=3, seed=1)
    with pytest.raises(UserError, match=r"a language model is Run\.policy"):
        _ = run.reward
    later = rlhf.rloo(
        model=run, env="text/Echo-v0", num_steps=1, episodes_per_step=8, evaluation={"episodes": 4}
    )
    assert Path(later.config["model"]["path"]) == run.model_path


def test_callbacks_are_objects_functions_and_classes(echo_model):
    steps = []

    class Count(rlhf.Callback):
        def on_end(self, event):
            steps.append("end")

    run = rlhf.rloo(
        model=echo_model,
        env="text/Echo-v0",
        num_steps=2,
        episodes_per_step=8,
        evaluation={"episodes": 4},
        callbacks=[lambda event: steps.append(event.step), Count(), Count],
    )
    assert steps == [1, 2, "end", "end"]
    assert run.config["callbacks"][0] == "object:callbacks.0.lambda"


def test_the_results_of_a_run(echo_model):
    run = rlhf.ppo(
        model=echo_model,
        env="text/Echo-v0",
        num_steps=3,
        episodes_per_step=8,
        evaluation={"episodes": 4},
        track=[],
    )
    rows = [row for row in metrics_of(run.directory) if row["step"]]
    assert list(run.metrics.index) == [row["step"] for row in rows]
    scores = [row["reward/mean"] for row in rows]
    assert run.metrics["reward/mean"].tolist() == scores
    assert set(run.samples["split"]) == {"before", "train", "after"}
    assert run.evaluations["ppo"]["env"] == "text/Echo-v0"
    assert run.report().name == "report.html"
    assert "reward/mean" in run._repr_html_()
    assert repr(rlhf.Run(run)) == "Run('runs/ppo')"
    other = rlhf.ppo(
        model=echo_model,
        env="text/Echo-v0",
        num_steps=1,
        episodes_per_step=8,
        evaluation={"episodes": 4},
        output_dir="runs/other",
    )
    page = rlhf.compare(run, other)._repr_html_()
    assert "<table>" in page
    assert "other - ppo" in page
    with pytest.raises(UserError, match="is not a run directory"):
        rlhf.Run("runs")
    with pytest.raises(UserError, match="runs/ppo"):
        rlhf.ppo(model=echo_model, env="text/Echo-v0")  # the directory exists


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "m", "tokenizer": object()}, "tokenizer has no effect on a model that is not"),
        ({"tokenizer": object()}, "tokenizer: it belongs to a loaded model"),
        ({"data": 3}, "data: expected a path, a datasets.Dataset or a list of rows, got int"),
        ({"data": []}, "got list without rows"),
        ({"data": {"train": [1], "test": [2]}}, r"data: choose a split, such as data\['train'\]"),
        ({"data": [{"prompt": {1, 2}}]}, "data: the rows cannot be written as JSON"),
        ({"data": {"prompt": "a"}}, "data: .* has no path; give rows as a list of mappings"),
        ({"env": "a", "prompts": [{"prompt": "a"}]}, "give env or prompts, not both"),
        ({"model": {"path": "m", "lora": {}}, "lora": {"rank": 2}}, "lora: model has adapters too"),
        ({"env": 3}, "env: expected a gymnasium id, an environment, or a class or function"),
        ({"algorithm": plugins.Settings()}, "algorithm: give a mapping of the settings to change"),
        ({"rewards": [3]}, "rewards.0: expected a function, a kind, a trained reward model or a"),
    ],
)
def test_wrong_objects_are_named(options, message):
    with pytest.raises(UserError, match=message):
        inputs.to_training_config(options)


@pytest.mark.parametrize("config", [3, [{}, 3], object()])
def test_a_configuration_of_another_type_is_named(config):
    with pytest.raises(UserError, match="config: expected a mapping, the path of a YAML file"):
        rlhf.ppo(config)


@pytest.mark.parametrize("function", [rlhf.compare, rlhf.report])
@pytest.mark.parametrize(("arguments", "got"), [([], "none"), ([["a", "b"]], "list"), ([3], "int")])
def test_runs_are_separate_arguments(function, arguments, got):
    name = function.__name__
    message = rf"{name}: expected runs .*, got {got}; write rlhf\.{name}\(first, second\)"
    with pytest.raises(UserError, match=message):
        function(*arguments)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": 3}, "generate: expected a text or a list, got int"),
        ({"prompts": TALK}, "a list of conversations, each a list of messages .*, got a list of d"),
        ({"prompts": "a", "samples": 0}, "samples must be >= 1, got 0"),
        ({"prompts": "a", "temperature": -1.0}, "temperature must be >= 0, got -1"),
        ({"prompts": "a", "max_new_tokens": "two"}, "max_new_tokens must be a valid integer"),
        ({"prompts": "a", "max_tokenz": 2}, "unknown key 'max_tokenz'; did you mean 'max_tokens'"),
    ],
)
def test_wrong_arguments_of_a_policy_are_named(arguments, message):
    policy = object.__new__(TextPolicy)  # the arguments are checked before the model is used
    policy.model = policy.tokenizer = None
    with pytest.raises(UserError, match=message):
        policy.generate(**arguments)


@pytest.mark.parametrize("argument", [TALK, ["a"]])
def test_a_reward_takes_a_list_of_conversations(argument):
    with pytest.raises(UserError, match="a reward: expected a list of conversations"):
        as_reward(judge)(argument)


def test_a_command_of_a_plugin_is_trained(echo_model, tmp_path):
    path = tmp_path / "named_here.py"
    path.write_text(
        "from rlhf.plugins import Settings, register_algorithm\n"
        "settings = Settings(num_epochs=2)\n"
        "register_algorithm('named_here', title='t', loss='clipped', settings=settings)\n"
    )
    keys = {"model": echo_model, "env": "text/Echo-v0", "num_steps": 1, "episodes_per_step": 4}
    run = rlhf.train("named_here", plugins=[str(path)], evaluation={"episodes": 2}, **keys)
    assert run.config["algorithm"]["num_epochs"] == 2


@pytest.mark.parametrize("call", [rlhf.train, lambda name: rlhf.stage(name, {})])
def test_a_command_without_a_run_is_named(call):
    with pytest.raises(UserError, match="doctor writes no run: use it on the command line"):
        call("doctor")


def test_unknown_arguments_are_named(echo_model):
    with pytest.raises(UserError, match="unknown key 'num_step'; did you mean 'num_steps'"):
        rlhf.ppo(model=echo_model, env="text/Echo-v0", num_step=3)  # type: ignore[call-arg]


def test_a_generation_configuration_is_converted():
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=4, temperature=0.7, eos_token_id=2)
    assert inputs.to_rollout_config(config) == {"max_new_tokens": 4, "temperature": 0.7}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=4)
    assert inputs.to_rollout_config(greedy) == {"max_new_tokens": 4, "temperature": 0.0}
    with pytest.raises(UserError, match="rollout: num_beams of GenerationConfig is not supported"):
        inputs.to_rollout_config(GenerationConfig(num_beams=4))


def test_policies_of_an_evaluation_are_objects(folder, echo_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = rlhf.sft(
        model=echo_model, data=sft_rows(), max_length=48, evaluations=1, trainer={"max_steps": 1}
    )
    loaded = AutoModelForCausalLM.from_pretrained(run.model_path)
    AutoTokenizer.from_pretrained(run.model_path).save_pretrained(folder / "tokenizer")
    loaded.config.name_or_path = loaded.name_or_path = str(run.model_path)
    judged = rlhf.evaluate(
        policies={"random": None, "run": run, "folder": run.model_path, "loaded": loaded},
        env={"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
        rollout={"max_new_tokens": 3},
        episodes=8,
    )
    assert judged.directory == Path("runs/evaluate")
    assert set(judged.evaluations) == {"random", "run", "folder", "loaded"}
    means = {name: e["metrics"]["return"]["mean"] for name, e in judged.evaluations.items()}
    assert means["run"] == means["folder"] == means["loaded"]
    again = rlhf.evaluate(judged.directory / "config.yaml", episodes=4, output_dir="runs/again")
    assert again.evaluations["run"]["episodes"] == 4
    with pytest.raises(UserError, match="only random and expert have none"):
        rlhf.evaluate(policies={"mine": None}, env="text/Echo-v0", output_dir="runs/no")
    with pytest.raises(UserError, match="did you mean 'episodes'"):
        rlhf.evaluate(policies={"random": None}, env="text/Echo-v0", episode=4)  # type: ignore


def test_functions_and_servers_are_policies_of_an_evaluation(folder):
    from rlhf.api.inputs import to_policy_configs
    from rlhf.config.evaluate import ApiSpec

    class Repeats:
        def __call__(self, messages):
            return messages[-1]["content"].removeprefix("Repeat: ")

    policies = {"function": lambda messages: "", "object": Repeats(), "class": Repeats}
    judged = rlhf.evaluate(policies=policies, env="text/Echo-v0", episodes=4)
    means = {name: e["metrics"]["return"]["mean"] for name, e in judged.evaluations.items()}
    assert means == {"function": 0.0, "object": 1.0, "class": 1.0}
    listed = [{"name": "mine", "path": Repeats()}]
    again = rlhf.evaluate(policies=listed, env="text/Echo-v0", episodes=4, output_dir="runs/again")
    assert again.evaluations["mine"]["metrics"]["return"]["mean"] == 1.0
    [entry] = to_policy_configs({"served": ApiSpec(url="http://localhost:8000/v1", model="big")})
    assert entry["api"]["model"] == "big"


def test_an_evaluation_of_rewards_reads_rows(echo_model):
    judged = rlhf.evaluate(pairs=pair_rows(8), rewards=[judge], output_dir="runs/pairs")
    assert judged.evaluations["pairs"]


def test_a_model_is_uploaded(monkeypatch, echo_model):
    """Another process than the server, because the client reads its address when it is imported."""
    run = rlhf.sft(
        model=echo_model, data=sft_rows(), max_length=48, evaluations=1, trainer={"max_steps": 1}
    )
    code = "import rlhf; print(rlhf.Run('runs/sft').push_to_hub('me/echo', private=True))"
    with HubServer() as hub:
        env = os.environ | hub.environment | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        wrong = env | {"HF_TOKEN": "hf_wrong"}
        refused = subprocess.run(words, env=wrong, capture_output=True, text=True)
    assert done.stdout.strip() == f"{hub.address}/me/echo"
    assert hub.private == {"me/echo": True}
    names = {path.name for path in run.model_path.iterdir() if path.is_file()}
    assert {name.rpartition("/")[2] for name in hub.files} == names
    for name in names:
        assert hub.files[f"me/echo/{name}"] == (run.model_path / name).read_bytes()
    assert "UserError: me/echo: the upload failed: " in refused.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not a name: the upload failed"):
        run.push_to_hub("not a name")


def test_the_rewards_of_a_gate_are_objects_too():
    tree = inputs.to_reward_config(
        {
            "kind": "gate",
            "reward": lambda cs: [0.5 for _ in cs],
            "condition": {"path": lambda cs: [len(c) - 1.5 for c in cs], "name": "length"},
            "at_least": 0.0,
            "otherwise": -1.0,
        },
        "rewards.0",
    )
    assert tree["reward"]["path"] == "object:rewards.0.reward.lambda"
    reply = {"role": "assistant", "content": "a"}
    # The condition is 0.5 for two messages, and -0.5 for one.
    assert build([tree])([[reply, reply], [reply]]) == [0.5, -1.0]


def test_a_class_is_no_reward():
    class Scorer:
        def __init__(self, conversations: Any) -> None: ...

    with pytest.raises(
        UserError, match=r"reward 'Scorer' is a class .*such as Scorer\(\), or in a"
    ):
        as_reward(Scorer)  # pyright: ignore[reportArgumentType]
