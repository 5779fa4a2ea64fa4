"""Environments with known faults, for tests of the checker."""

import random
import sys

import gymnasium as gym
import numpy as np

from rlhf.envs.core import FreeText, TextEnv


class Sound(TextEnv):
    """An environment without faults."""

    max_turns = 3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.hidden, self.left = int(self.np_random.integers(3)), 3
        return self.opening("0, 1 or 2?")

    def step(self, action):
        self.left -= 1
        right = action == str(self.hidden)
        return self.turn("no", float(right), right or self.left == 0, success=right)

    def legal_actions(self):
        return ["0", "1", "2"]


class GlobalDraws(Sound):
    def step(self, action):
        random.random()
        np.random.random()
        return super().step(action)


class Shared(Sound):
    counter = 0

    def step(self, action):
        type(self).counter += 1
        text, *rest = super().step(action)
        return (f"{text} {self.counter}", *rest)


class Fragile(Sound):
    def step(self, action):
        int(action)
        return super().step(action)


class Gullible(Sound):
    def step(self, action):
        _, _, *rest = self.turn("yes", 1.0, True, success=True)
        return ("yes", 1.0, *rest)


class Changeling(Sound):
    def step(self, action):
        text, reward, done, cut, info = super().step(action)
        return text, reward, done, cut, {**info, "score": 1 if self.left == 2 else 0.5}


class Endless(Sound):
    def step(self, action):
        text, reward, _, cut, info = super().step(action)
        return text, reward, False, cut, info


class Boastful(Sound):
    def optimal_value(self):
        return 5.0

    def random_value(self):
        return 0.0

    def best_action(self):
        return "0"


class Alphabet(gym.Env):
    metadata = {"render_modes": [], "render_fps": 1}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Text(50)
        self.action_space = FreeText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "two words", {}

    def step(self, action):
        return "x", 0.0, True, False, {}


class Stated(TextEnv):
    """Say yes. Its values are right."""

    system_prompt = "Say yes."

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.luck = int(self.np_random.integers(2))
        return self.opening(f"yes or no? ({self.luck})")

    def step(self, action):
        return self.turn("", float(action == "yes"), True, success=action == "yes")

    def legal_actions(self):
        return ["yes", "no"]

    def best_action(self):
        return "yes"

    def optimal_value(self):
        return 1.0

    def random_value(self):
        return 0.5


class Priced(Stated):
    """Say yes three times, at 1 each, within five turns. Its values are right."""

    max_turns = 5
    price = 1.0
    ends = False

    def reset(self, *, seed=None, options=None):
        self.said, self.left = 0, 5
        return super().reset(seed=seed)

    def step(self, action):
        self.left -= 1
        if action not in ("yes", "no"):
            done = self.ends or self.left == 0
            return self.turn("what?", -self.price, done, valid=False)
        self.said += action == "yes"
        won = self.said == 3
        return self.turn("on", -1.0, won or self.left == 0, success=won)

    def optimal_value(self):
        return -3.0

    def random_value(self):
        # The third yes comes with turn 3 (1/8) or 4 (3/16), or five turns pass.
        return -(3 * 2 + 4 * 3 + 5 * 11) / 16


class Idle(Priced):
    """An invalid action costs nothing, a step does."""

    price = 0.0


class Prolix(Stated):
    """Words after the action increase the reward."""

    def step(self, action):
        right = action.startswith("yes")
        return self.turn("", float(right) + 0.1 * action.count("no"), True, success=right)


class Quitter(Priced):
    """An invalid action ends the episode, which costs less than playing it."""

    ends = True


class Unstated(gym.Env):
    """Nothing is known of it but that replies cost and junk does not."""

    metadata = {"render_modes": [], "render_fps": 1}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space, self.action_space = FreeText(), FreeText(sampler=self.draw)

    def draw(self, rng):
        return ("left", "right")[int(rng.integers(2))]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.left = 0, 6
        return "Walk right twice.", {}

    def step(self, action):
        self.left -= 1
        if action not in ("left", "right"):
            return "what?", 0.0, self.left == 0, False, {"valid": False}
        self.place += 1 if action == "right" else -1
        return "on", -1.0, self.place == 2 or self.left == 0, False, {"valid": True}


class Substring(Unstated):
    """Guess a digit; a reply that contains it anywhere is right."""

    def draw(self, rng):
        return str(int(rng.integers(5)))

    def reset(self, *, seed=None, options=None):
        text, info = super().reset(seed=seed)
        self.hidden = str(int(self.np_random.integers(5)))
        return text, info

    def step(self, action):
        return "", float(self.hidden in action), True, False, {}


class Quits(Sound):
    """An empty reply ends the process."""

    def step(self, action):
        return super().step(action) if action else sys.exit(3)


class Numbers(Unstated):
    """Actions are numbers: a reply that is none ends the episode without the cost of a step."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.action_space = gym.spaces.Discrete(2)

    def step(self, action):
        return super().step(("left", "right")[int(action)])


class Guess(TextEnv):
    """One guess of a number from 0 to 3, drawn in `start`, where its attribute is first set.

    The hidden number is uniform and nothing is shown of it, so every guess earns 1/4.
    """

    system_prompt = "Guess a number. Please be careful."

    def start(self):
        self.hidden = self.draw()
        return "0, 1, 2 or 3?"

    def draw(self):
        return int(self.np_random.integers(4))

    def pays(self, action):
        return action == str(self.hidden)

    def step(self, action):
        self.turns_left -= 1
        return self.turn("", float(self.pays(action)), True)

    def legal_actions(self):
        return ["0", "1", "2", "3"]

    def best_action(self):
        return "0"

    def optimal_value(self):
        return 0.25

    def random_value(self):
        return 0.25


class OwnGenerator(Guess):
    """Draws by a generator that `reset` makes of the seed."""

    def reset(self, *, seed=None, options=None):
        self.generator = random.Random(seed)
        return super().reset(seed=seed)

    def draw(self):
        return self.generator.randrange(4)


class Squares(Guess):
    """The number is 0 with probability 1/2, because sqrt(1/4) = 1/2; the solver has no powers."""

    def draw(self):
        return int(4 * self.np_random.random() ** 2)

    def optimal_value(self):
        return 0.5

    def random_value(self):
        return 0.25


class NoPlay(Guess):
    """States an optimum, and no policy that reaches it."""

    def best_action(self):
        raise NotImplementedError


class Undefined(Guess):
    def optimal_value(self):
        return float("nan")


class Optimist(Unstated):
    """No `TextEnv`; its expert walks right twice, which costs 2, and not the stated optimum."""

    def expert(self, rng=None):
        return "right"

    def optimal_value(self):
        return 1.0


class AcceptsNan(Guess):
    def pays(self, action):
        try:
            return not abs(float(action) - self.hidden) > 0.5
        except ValueError:
            return False


class Polite(Guess):
    def pays(self, action):
        return super().pays(action) or "careful" in action


class Late(Guess):
    """Shows the number after eleven turns without a guess; random numbers cannot be enumerated."""

    max_turns = 12

    def draw(self):
        return int(self.np_random.integers(10**5)) % 4

    def step(self, action):
        if action in self.legal_actions():
            return super().step(action)
        self.turns_left -= 1
        return self.turn("no", 0.0, valid=False)

    def best_action(self):
        return str(self.hidden) if self.turns_left == 1 else "0"


class Zero(Unstated):
    """The first observation is the number 0, which is not empty."""

    def reset(self, *, seed=None, options=None):
        return 0, super().reset(seed=seed)[1]


FAULTY = (
    Sound, GlobalDraws, Shared, Fragile, Gullible, Changeling, Endless, Boastful, Alphabet,
    Stated, Priced, Idle, Prolix, Quitter, Unstated, Substring, Quits,
    Numbers, Guess, OwnGenerator, Squares, NoPlay, Undefined, Optimist, AcceptsNan, Polite, Late,
    Zero,
)  # fmt: skip
for kind in FAULTY:
    gym.register(f"third_party/{kind.__name__}-v0", entry_point=f"{__name__}:{kind.__name__}")
