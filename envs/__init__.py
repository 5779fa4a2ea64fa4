"""Gymnasium text environments, most of which have a known optimum.

`import rlhf.envs` registers every task in gymnasium's namespace `text`. Without that import,
`gym.make("rlhf.envs:text/Echo-v0")` imports the package before it creates the task (gymnasium has
had no plugins since version 1.0). The module of a task is imported when the task is created:

    import gymnasium as gym
    import rlhf.envs

    env = gym.make("text/PreferenceBandit-v0")
    many = gym.make_vec("text/PreferenceBandit-v0", num_envs=8)
"""

from __future__ import annotations

import gymnasium as gym

if __name__ != "rlhf.envs":  # a second import would define each class twice
    raise ImportError("import rlhf.envs instead of envs")

# name: (entry point, reward threshold above which the task counts as solved)
TASKS: dict[str, tuple[str, float | None]] = {
    "Bandit-v0": ("rlhf.envs.bandit:Bandit", 6.2),
    "CliffWalking-v0": ("rlhf.envs.toy_text:CliffWalking", -15.0),
    "Echo-v0": ("rlhf.envs.echo:Echo", 0.95),
    "FrozenLake-v0": ("rlhf.envs.toy_text:FrozenLake", 0.7),
    "GuessNumber-v0": ("rlhf.envs.guess_number:GuessNumber", 0.7),
    "KeyDoor-v0": ("rlhf.envs.key_door:KeyDoor", 0.85),
    "KnowledgeGraph-v0": ("rlhf.envs.knowledge_graph:KnowledgeGraph", 0.8),
    "KuhnPoker-v0": ("rlhf.envs.kuhn_poker:KuhnPoker", -0.02),
    "PreferenceBandit-v0": ("rlhf.envs.preference_bandit:PreferenceBandit", 0.9),
    "ProgramSynthesis-v0": ("rlhf.envs.program_synthesis:ProgramSynthesis", 0.9),
    "Prompts-v0": ("rlhf.envs.prompts:PromptEnv", None),
    "Recommend-v0": ("rlhf.envs.recommend:Recommend", 4.1),
    "Support-v0": ("rlhf.envs.support:Support", 0.45),
    "TMaze-v0": ("rlhf.envs.tmaze:TMaze", 0.95),
    "Taxi-v0": ("rlhf.envs.toy_text:Taxi", 7.0),
    "TicTacToe-v0": ("rlhf.envs.tictactoe:TicTacToe", 0.9),
    "ToolLookup-v0": ("rlhf.envs.tool_lookup:ToolLookup", 0.85),
    "Triage-v0": ("rlhf.envs.triage:Triage", 0.75),
    "Wordle-v0": ("rlhf.envs.wordle:Wordle", 0.9),
}

# name: (entry point, the optional extra that it needs)
EXTRAS: dict[str, tuple[str, str]] = {
    "ReasoningGym-v0": ("rlhf.envs.adapters.reasoning_gym:ReasoningGym", "reasoning-gym"),
    "TextArena-v0": ("rlhf.envs.adapters.textarena:TextArena", "textarena"),
    "TextWorld-v0": ("rlhf.envs.adapters.textworld:TextWorld", "textworld"),
}


def is_built_in(env_id: str) -> bool:
    """Return whether an id, optionally with its module, names an environment of this package."""
    namespace, _, name = env_id.rpartition(":")[2].partition("/")
    return namespace == "text" and (name in TASKS or name in EXTRAS)


for _name, (_entry_point, _) in {**TASKS, **EXTRAS}.items():
    gym.register(
        id=f"text/{_name}",
        entry_point=_entry_point,
        vector_entry_point=f"rlhf.envs.vector:text/{_name}",
        reward_threshold=TASKS[_name][1] if _name in TASKS else None,
    )
