"""The table of all commands. Each row names the function and the configuration of a command."""

from __future__ import annotations

import dataclasses

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.commands.command import Command, CommandTable


def _offline_command(
    name: str,
    summary: str,
    trainer_options: str,
    config: str = "rlhf.config.offline:OfflineConfig",
) -> Command:
    """Return the command of a method that trains on a dataset."""
    return Command(
        name,
        summary,
        config,
        "rlhf.training.offline:train_offline",
        plan="rlhf.commands.dry_run:plan_offline",
        makes_run=True,
        options={"trainer": trainer_options},
    )


ONLINE_GROUP = "Training (each command writes a run directory)"
"""Heading of the training commands."""


def online_command(name: str, summary: str) -> Command:
    """Return the command of an online algorithm."""
    return Command(
        name,
        summary,
        "rlhf.config.online:OnlineConfig",
        "rlhf.training.online:train_online",
        plan="rlhf.commands.dry_run:plan_online",
        makes_run=True,
        defaults={"algorithm": dataclasses.asdict(ALGORITHMS[name].settings)},
    )


COMMANDS = CommandTable(
    {
        "Start": [
            Command(
                "init",
                "write a commented project: configuration, environment, reward, algorithm, CI gate",
                "rlhf.commands.init:InitConfig",
                "rlhf.commands.init:init",
                arguments=("template", "directory"),
            ),
            Command(
                "doctor",
                "print versions, hardware, automatic choices such as device, and what is missing",
                "rlhf.commands.doctor:DoctorConfig",
                "rlhf.commands.doctor:doctor",
            ),
            Command(
                "completion",
                "print a script that completes commands and keys in bash, zsh or fish",
                "rlhf.commands.completion:ShellCompletionConfig",
                "rlhf.commands.completion:shell_completion_script",
                arguments=("shell",),
                runs_commands=True,
            ),
        ],
        "Whole experiments": [
            Command(
                "run",
                "run every stage of a pipeline in order, then write one report",
                "rlhf.pipeline:Pipeline",
                "rlhf.pipeline:run",
                plan="rlhf.pipeline:plan",
                arguments=("config",),
                runs_commands=True,
                read="rlhf.pipeline:read_pipeline",
            ),
            Command(
                "report",
                "write report.html for a run or a pipeline, or compare several runs",
                "rlhf.commands.report:ReportConfig",
                "rlhf.commands.report:report",
                arguments=("directories",),
            ),
            Command(
                "branch",
                "copy a checkpoint of a run into a new run, which continues with --resume",
                "rlhf.commands.branch:BranchConfig",
                "rlhf.commands.branch:branch",
                arguments=("checkpoint", "output_dir"),
            ),
            Command(
                "replay",
                "repeat the check of the alarm that ended a run; exit code 1 if it does not recur",
                "rlhf.commands.replay:AlarmReplayConfig",
                "rlhf.commands.replay:repeat_alarm_check",
                arguments=("directory",),
                runs_commands=True,
            ),
            Command(
                "compare",
                "print paired differences between runs with confidence intervals",
                "rlhf.commands.report:CompareConfig",
                "rlhf.commands.report:compare",
                arguments=("runs",),
            ),
            Command(
                "bench",
                "run a benchmark of environments x algorithms x seeds; regression gate for CI",
                "rlhf.config.bench:BenchCommandConfig",
                "rlhf.studies.bench.run:run",
                plan="rlhf.studies.bench.run:plan",
                arguments=("config",),
                runs_commands=True,
            ),
            Command(
                "plan-seeds",
                "plan the numbers of training seeds and episodes that detect a difference",
                "rlhf.commands.plan_seeds:PlanSeedsConfig",
                "rlhf.commands.plan_seeds:report_seed_plan",
                arguments=("runs",),
            ),
            Command(
                "sweep",
                "run a training command with every combination of settings and seeds",
                "rlhf.config.sweep:SweepCommandConfig",
                "rlhf.studies.sweep.run:run",
                plan="rlhf.studies.sweep.run:plan",
                arguments=("config",),
                runs_commands=True,
            ),
            Command(
                "tune",
                "search hyperparameters with the same budget for each algorithm of a benchmark",
                "rlhf.config.tune:TuneCommandConfig",
                "rlhf.studies.tune.run:run",
                plan="rlhf.studies.tune.run:plan",
                arguments=("config",),
                runs_commands=True,
            ),
        ],
        ONLINE_GROUP: [
            _offline_command("sft", "supervised fine-tuning on demonstrations", "trl:SFTConfig"),
            _offline_command(
                "reward",
                "train a reward model on pairs, rankings, labels or steps",
                "trl:RewardConfig",
                "rlhf.config.reward:RewardConfig",
            ),
            _offline_command("dpo", "direct preference optimization", "trl:DPOConfig"),
            _offline_command(
                "kto", "Kahneman-Tversky optimization on labeled completions", "trl:KTOConfig"
            ),
            *(online_command(name, row.title) for name, row in ALGORITHMS.items()),
        ],
        "Measuring and using models": [
            Command(
                "evaluate",
                "evaluate policies and rewards on held-out episodes, text or pairs",
                "rlhf.config.evaluate:EvaluateConfig",
                "rlhf.evaluation.runner:run_evaluation",
                makes_run=True,
            ),
            Command(
                "reward-report",
                "evaluate a reward: accuracy, calibration, baselines, stress tests, verdict",
                "rlhf.studies.reward_report:RewardReportConfig",
                "rlhf.studies.reward_report:run_reward_report",
                makes_run=True,
            ),
            Command(
                "overoptimize",
                "optimize proxies of a known gold score and measure when the gold score falls",
                "rlhf.config.overoptimize:OveroptimizeConfig",
                "rlhf.studies.overoptimize.run:run_overoptimize",
                plan="rlhf.studies.overoptimize.run:plan",
                makes_run=True,
                runs_commands=True,
            ),
            Command(
                "explain",
                "explain rewards, policies and training stages token by token, on an HTML page",
                "rlhf.config.explain:ExplainConfig",
                "rlhf.commands.explain:explain",
                makes_run=True,
            ),
            Command(
                "generate",
                "sample completions of a model for prompts",
                "rlhf.commands.generate:GenerateConfig",
                "rlhf.commands.generate:generate",
            ),
            Command(
                "chat",
                "talk to models side by side, in the terminal or on a local page",
                "rlhf.config.chat:ChatConfig",
                "rlhf.commands.chat:chat",
                arguments=("models",),
                defaults={"rollout": {"max_new_tokens": 256}},
            ),
            Command(
                "score",
                "score conversations with a reward",
                "rlhf.commands.score:ScoreConfig",
                "rlhf.commands.score:score",
            ),
            Command(
                "serve",
                "serve a model and rewards over HTTP, compatible with clients of OpenAI",
                "rlhf.config.serve:ServeConfig",
                "rlhf.commands.serve:serve",
                read="rlhf.commands.serve:move_api_key_to_environment_and_read_config",
            ),
        ],
        "People": [
            Command(
                "label",
                "collect preferences, ratings, rankings or replies on a page or in the terminal",
                "rlhf.commands.label:LabelConfig",
                "rlhf.commands.label:label",
            ),
            Command(
                "labels agreement",
                "print the agreement of annotators (Cohen's and Fleiss' kappa)",
                "rlhf.commands.labels:LabelAgreementConfig",
                "rlhf.commands.labels:report_agreement",
                arguments=("files",),
            ),
            Command(
                "labels export",
                "write labels as JSON of Argilla or Label Studio, or as a dataset",
                "rlhf.commands.labels:LabelExportConfig",
                "rlhf.commands.labels:export_label_files",
                arguments=("files",),
            ),
            Command(
                "labels import",
                "append labels from JSON of Argilla or Label Studio, or from a dataset",
                "rlhf.commands.labels:LabelImportConfig",
                "rlhf.commands.labels:import_label_file",
                arguments=("path",),
            ),
        ],
        "Data, models and environments": [
            Command(
                "demos",
                "write demonstrations and preference pairs from an environment's expert",
                "rlhf.commands.demos:DemosConfig",
                "rlhf.commands.demos:write_demos_into_run",
                makes_run=True,
            ),
            Command(
                "split",
                "split a dataset by prompt",
                "rlhf.commands.split:SplitConfig",
                "rlhf.commands.split:write_split_into_run",
                makes_run=True,
            ),
            Command(
                "pairs",
                "create preference pairs from a model's samples and a known score",
                "rlhf.commands.pairs:PairsConfig",
                "rlhf.commands.pairs:sample_pairs_into_run",
                makes_run=True,
            ),
            Command(
                "data check",
                "find duplicates, leakage, contradictions and suspect rows; exit code 1 on a fault",
                "rlhf.commands.data_check:DataCheckConfig",
                "rlhf.commands.data_check:check_data",
                arguments=("path",),
            ),
            Command(
                "models list",
                "list the short names of models",
                "rlhf.commands.models:ModelListConfig",
                "rlhf.commands.models:list_models",
            ),
            Command(
                "models get",
                "download a model and print its folder",
                "rlhf.commands.models:ModelDownloadConfig",
                "rlhf.commands.models:download_model",
                arguments=("name",),
            ),
            Command(
                "models merge",
                "merge a LoRA adapter into its base model",
                "rlhf.commands.models:AdapterMergeConfig",
                "rlhf.commands.models:merge_model",
                arguments=("adapter", "target"),
            ),
            Command(
                "export",
                "write a trained model with its cards; GGUF, ONNX, upload to the Hub",
                "rlhf.config.export:ExportConfig",
                "rlhf.commands.export:export",
                arguments=("source", "target"),
            ),
            Command(
                "engine start",
                "start the vLLM servers of a training run and wait until they answer",
                "rlhf.config.online:OnlineConfig",
                "rlhf.commands.engine:start_vllm_servers",
                arguments=("config",),
            ),
            Command(
                "envs list",
                "list environments with their horizon and the returns of optimal and random play",
                "rlhf.commands.envs:EnvListConfig",
                "rlhf.commands.envs:list_environments",
            ),
            Command(
                "envs demos",
                "write one file of demonstrations or pairs from an environment's expert",
                "rlhf.commands.demos:EnvDemosConfig",
                "rlhf.commands.demos:write_env_demos",
                arguments=("env",),
            ),
            Command(
                "envs play",
                "play an environment in the terminal",
                "rlhf.commands.envs:EnvConfig",
                "rlhf.commands.envs:play_environment",
                arguments=("env",),
            ),
            Command(
                "envs check",
                "check an environment; exit code 2 on a finding",
                "rlhf.commands.envs:EnvConfig",
                "rlhf.commands.envs:check_environment",
                arguments=("env",),
            ),
            Command(
                "algorithms",
                "list online algorithms with their paper, equation and settings",
                "rlhf.commands.algorithms:AlgorithmsConfig",
                "rlhf.commands.algorithms:list_algorithms",
                arguments=("name",),
            ),
        ],
    }
)

configure = COMMANDS.config_from_tree
run_command = COMMANDS.run_command
