"""Right programs of many styles with their tests; each must pass."""

HONEST: dict[str, tuple[str, str]] = {
    "arithmetic": ("def f(a, b):\n    return a + b", "assert f(2, 3) == 5"),
    "negative and large numbers": (
        "def f(n):\n    return -(10 ** n)",
        "assert f(400) == -(10 ** 400)\nassert f(0) == -1",
    ),
    "factorial with many digits": (
        "import math\ndef f(n):\n    return math.factorial(n)",
        "import math\nassert f(3000) == math.factorial(3000)",
    ),
    "floats": ("def f(x):\n    return x / 3", "assert abs(f(1) - 1 / 3) < 1e-12"),
    "infinity and nan": (
        "def f(s):\n    return float(s)",
        "assert f('inf') == float('inf')\nassert f('nan') != f('nan')",
    ),
    "complex numbers": ("def f(z):\n    return z * 1j", "assert f(2 + 1j) == -1 + 2j"),
    "text": ("def f(s):\n    return s[::-1].upper()", "assert f('abc') == 'CBA'"),
    "Unicode": (
        "def f(s):\n    return s + '\\ud800'",
        "assert f('naïve 你好 \\U0001f600') == 'naïve 你好 \\U0001f600\\ud800'",
    ),
    "bytes": (
        "def f(b):\n    return bytes(reversed(b))",
        "assert f(b'\\x00\\xff') == b'\\xff\\x00'",
    ),
    "tuples and lists": (
        "def f(x):\n    return (x[0], [x[1]])",
        "assert f([1, 2]) == (1, [2])\nassert isinstance(f([1, 2]), tuple)",
    ),
    "sets": ("def f(x):\n    return set(x)", "assert f([1, 1, (2, 3)]) == {1, (2, 3)}"),
    "dictionary with numbers as keys": (
        "def f(s):\n    return {len(w): w for w in s.split()}",
        "assert f('a bc') == {1: 'a', 2: 'bc'}",
    ),
    "counter": (
        "from collections import Counter\ndef f(s):\n    return Counter(s)",
        "assert f('aab') == {'a': 2, 'b': 1}\nassert f('aab')['a'] == 2",
    ),
    "defaultdict": (
        "from collections import defaultdict\ndef f(n):\n    d = defaultdict(list)\n"
        "    for i in range(n):\n        d[i % 2].append(i)\n    return d",
        "assert f(4) == {0: [0, 2], 1: [1, 3]}",
    ),
    "named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\n"
        "def f(a):\n    return P(a, -a)",
        "assert f(1) == (1, -1)",
    ),
    "deque": (
        "from collections import deque\ndef f(x):\n    d = deque(x)\n    d.rotate(1)\n    return d",
        "from collections import deque\nassert f([1, 2, 3]) == deque([3, 1, 2])",
    ),
    "nothing": ("def f():\n    pass", "assert f() is None"),
    "truth values": (
        "def f(n):\n    return n > 1 and all(n % i for i in range(2, n))",
        "assert f(7)\nassert not f(8)\nassert f(7) is True",
    ),
    "recursion": (
        "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)",
        "assert [f(i) for i in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(20000)\ndef f(n):\n    return n and 1 + f(n - 1)",
        "assert f(5000) == 5000",
    ),
    "memoized recursion": (
        "from functools import lru_cache\n@lru_cache(None)\ndef f(n):\n"
        "    return n if n < 2 else f(n - 1) + f(n - 2)",
        "assert f(90) == 2880067194370816120",
    ),
    "generator": (
        "def f(n):\n    a, b = 0, 1\n    for _ in range(n):\n        yield a\n"
        "        a, b = b, a + b",
        "assert list(f(5)) == [0, 1, 1, 2, 3]\nassert next(f(1)) == 0",
    ),
    "infinite generator": (
        "import itertools\ndef f():\n    yield from itertools.count(1)",
        "g = f()\nassert [next(g) for _ in range(3)] == [1, 2, 3]",
    ),
    "range and map": (
        "def f(n):\n    return range(n)\ndef g(n):\n    return map(str, range(n))",
        "assert f(3) == range(3)\nassert list(g(2)) == ['0', '1']",
    ),
    "closure": (
        "def f(n):\n    def add(x):\n        nonlocal n\n        n += x\n        return n\n"
        "    return add",
        "add = f(1)\nassert add(2) == 3\nassert add(2) == 5",
    ),
    "decorator": (
        "import functools\ndef twice(g):\n    @functools.wraps(g)\n    def run(x):\n"
        "        return g(g(x))\n    return run\n@twice\ndef f(x):\n    return x + 1",
        "assert f(1) == 3\nassert f.__name__ == 'f'",
    ),
    "default and keyword arguments": (
        "def f(a, *rest, b=2, **more):\n    return a + sum(rest) + b + sum(more.values())",
        "assert f(1) == 3\nassert f(1, 2, 3, b=4, c=5) == 15",
    ),
    "function as argument": (
        "def f(g, x):\n    return [g(i) for i in x]",
        "assert f(lambda i: i * i, [1, 2]) == [1, 4]\nassert f(str, [1]) == ['1']",
    ),
    "own function as argument": (
        "def f(g, x):\n    return g(g(x))\ndef h(x):\n    return x * 2",
        "assert f(h, 3) == 12",
    ),
    "change in place": (
        "def f(x):\n    x.sort()\n    x.append(0)",
        "row = [3, 1]\nassert f(row) is None\nassert row == [1, 3, 0]",
    ),
    "matrix in place": (
        "def f(m):\n    for row in m:\n        row.reverse()",
        "m = [[1, 2], [3, 4]]\nf(m=m)\nassert m == [[2, 1], [4, 3]]",
    ),
    "class": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n"
        "    def push(self, x):\n        self.items.append(x)\n        return self\n"
        "    def pop(self):\n        return self.items.pop()\n"
        "    def __len__(self):\n        return len(self.items)",
        "s = Stack().push(1).push(2)\nassert len(s) == 2\nassert s.pop() == 2\n"
        "assert s.items == [1]\nassert isinstance(s, Stack)\nassert s",
    ),
    "linked list": (
        "class Node:\n    def __init__(self, value, next=None):\n"
        "        self.value, self.next = value, next\n"
        "def reverse(node):\n    last = None\n    while node:\n"
        "        node.next, last, node = last, node, node.next\n    return last",
        "head = reverse(Node(1, Node(2)))\nassert head.value == 2\nassert head.next.value == 1\n"
        "assert head.next.next is None",
    ),
    "tree that the tests build": (
        "class T:\n    def __init__(self, v):\n        self.v, self.l, self.r = v, None, None\n"
        "def depth(t):\n    return 0 if t is None else 1 + max(depth(t.l), depth(t.r))",
        "t = T(1)\nt.l = T(2)\nt.l.r = T(3)\nassert depth(t) == 3\nassert t.l.r is t.l.r",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n"
        "    x: int\n    y: int = 0\n"
        "    def moved(self, d):\n        return P(self.x + d, self.y)",
        "assert P(1).moved(2) == P(3)\nassert P(1) != P(2)\nassert P(1) < P(2)\n"
        "assert repr(P(1)) == 'P(x=1, y=0)'",
    ),
    "operators": (
        "class V:\n    def __init__(self, *x):\n        self.x = x\n"
        "    def __add__(self, o):\n        return V(*(a + b for a, b in zip(self.x, o.x)))\n"
        "    def __eq__(self, o):\n        return self.x == o.x\n"
        "    def __getitem__(self, i):\n        return self.x[i]",
        "assert V(1, 2) + V(3, 4) == V(4, 6)\nassert V(1, 2)[1] == 2\nassert 2 in V(1, 2)",
    ),
    "inheritance": (
        "from abc import ABC, abstractmethod\nclass A(ABC):\n    @abstractmethod\n"
        "    def area(self): ...\nclass S(A):\n    def __init__(self, a):\n        self.a = a\n"
        "    def area(self):\n        return self.a ** 2\n    @property\n    def side(self):\n"
        "        return self.a",
        "s = S(3)\nassert s.area() == 9\nassert s.side == 3\nassert isinstance(s, A)",
    ),
    "enumeration": (
        "from enum import Enum, IntEnum\nclass C(Enum):\n    RED = 1\nclass N(IntEnum):\n"
        "    ONE = 1\n"
        "def f():\n    return C.RED",
        "assert f() is C.RED\nassert f() == C.RED\nassert f().name == 'RED'\nassert N.ONE == 1",
    ),
    "context manager": (
        "from contextlib import contextmanager\nlog = []\n@contextmanager\ndef f(x):\n"
        "    log.append('in')\n    yield x\n    log.append('out')",
        "with f(3) as x:\n    assert x == 3\nassert log == ['in', 'out']",
    ),
    "builtin exception": (
        "def f(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x",
        "try:\n    f(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\n"
        "else:\n    assert False",
    ),
    "own exception": (
        "class Base(KeyError):\n    pass\nclass Missing(Base):\n    pass\n"
        "def f(x):\n    raise Missing(x)",
        "for kind in (Missing, Base, KeyError):\n    try:\n        f(3)\n"
        "    except kind as error:\n        assert error.args == (3,)\n"
        "    else:\n        assert False",
    ),
    "exact fractions": (
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "def f():\n    return Fraction(1, 3), Decimal('1.10')",
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "assert f() == (Fraction(1, 3), Decimal('1.1'))",
    ),
    "dates": (
        "import datetime as d\ndef f(day):\n    return day + d.timedelta(days=1)",
        "import datetime as d\nassert f(d.date(2024, 2, 28)) == d.date(2024, 2, 29)\n"
        "assert f(d.datetime(2024, 2, 28, 5)) == d.datetime(2024, 2, 29, 5)",
    ),
    "regular expressions": (
        "import re\ndef f(s):\n    return re.findall(r'[0-9]+', s)",
        "assert f('a1b22') == ['1', '22']",
    ),
    "heap, bisection and combinations": (
        "import heapq, bisect, itertools, operator, string, random, json, math, statistics\n"
        "def f(x):\n    return heapq.nsmallest(2, x), bisect.bisect(sorted(x), 2),"
        " list(itertools.combinations(x, 2))",
        "assert f([3, 1, 2]) == ([1, 2], 2, [(3, 1), (3, 2), (1, 2)])",
    ),
    "modules of the tests": (
        "def f(x):\n    return x ** 0.5",
        "assert math.isclose(f(2), 1.4142135, rel_tol=1e-6)\nassert math.floor(f(9)) == 3",
    ),
    "asynchronous code": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x + 1\n"
        "def f(x):\n    return asyncio.run(g(x))",
        "assert f(1) == 2",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n"
        "    with ThreadPoolExecutor(4) as pool:\n        return list(pool.map(abs, range(-n, 0)))",
        "assert f(3) == [3, 2, 1]",
    ),
    "large printed output": (
        "def f(n):\n    for i in range(n):\n        print('line', i)\n    return n\nf(20_000)",
        "assert f(10) == 10",
    ),
    "large result": (
        "def f(n):\n    return list(range(n))",
        "assert f(200_000) == list(range(200_000))",
    ),
    "streams in memory": (
        "import io, sys, contextlib\ndef f(text):\n    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n        print(sum(map(int, text.split())))\n"
        "    return out.getvalue()",
        "assert f('1 2 3') == '6\\n'",
    ),
    "main block": (
        "def f():\n    return 1\nif __name__ == '__main__':\n    print(f())",
        "assert f() == 1",
    ),
    "type annotations": (
        "from __future__ import annotations\nfrom typing import Optional\n"
        "def f(x: list[int]) -> Optional[int]:\n    return max(x, default=None)",
        "assert f([]) is None\nassert f([1, 2]) == 2",
    ),
    "global state": (
        "count = 0\ndef f():\n    global count\n    count += 1",
        "f()\nf()\nassert count == 2",
    ),
    "name of a builtin": (
        "def sum(a, b):\n    return a * b",
        "assert program.sum(2, 3) == 6\nassert sum([2, 3]) == 5",
    ),
    "only the name of a builtin": (
        "def sum(a, b):\n    return a * b",
        "assert sum(2, 3) == 6\nassert sum(4, 5) == 20",
    ),
    "only the name of a builtin, with a module and an exception": (
        "def max(a):\n    if not a:\n        raise ValueError\n    return -a[0]",
        "assert math.isclose(max([2.0]), -2.0)\n"
        "try:\n    max([])\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError",
    ),
    "function with checks": (
        "def add(a, b):\n    return a + b",
        "def check(candidate):\n    assert candidate(1, 2) == 3\n"
        "    assert candidate('a', 'b') == 'ab'\n"
        "check(add)",
    ),
    "unit test": (
        "def f(x):\n    return x + 1",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(f(1), 2)\n"
        "assert unittest.TextTestRunner().run("
        "unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()",
    ),
    "main program of unit tests": (
        "def f(x):\n    return x + 1",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(f(1), 2)\n"
        "if __name__ == '__main__':\n    unittest.main()",
    ),
    "documentation test": (
        "def f(x):\n    return x + 1",
        "import doctest\ndef t():\n    '''\n    >>> f(1)\n    2\n    '''\n"
        "assert doctest.testmod() == (0, 1)",
    ),
    "methods of a generator": (
        "def f():\n    try:\n        while True: yield (yield)\n"
        "    except ValueError:\n        return",
        "g = f()\nnext(g)\nassert g.send(3) == 3\n"
        "try:\n    g.throw(ValueError)\nexcept StopIteration:\n    pass\n"
        "else:\n    raise AssertionError",
    ),
}
NUMPY: dict[str, tuple[str, str]] = {
    "numpy scalar": (
        "import numpy as np\ndef f(x):\n    return np.mean(x), np.int64(3), np.bool_(True)",
        "assert f([1.0, 2.0]) == (1.5, 3, True)",
    ),
    "numpy array": (
        "import numpy as np\ndef f(x):\n    return np.array(x).T @ np.array(x)",
        "assert (f([[1, 2], [3, 4]]) == np.array([[10, 14], [14, 20]])).all()\n"
        "assert np.allclose(f(np.eye(2)), np.eye(2))",
    ),
    "evaluated expression": (
        "def f(n):\n    return '(4 + 2) * abs(-4)'",
        "assert eval(f(24)) == 24",
    ),
    "evaluated expression with names": (
        "def f(n):\n    return 'sum(math.sqrt(n * n) for i in range(2)) / 2'",
        "import math\nassert eval(f(24), {'n': 24, 'math': math}) == 24",
    ),
    "evaluated function": (
        "def f(n):\n    return f'lambda x: x ** {n}'",
        "assert eval(f(2))(3) == 9",
    ),
    "executed tests": (
        "def f(s):\n    return s * 2",
        "def check():\n    first = f('a')\n    exec('assert first == \"aa\"')\n"
        'check()\nexec(\'assert f("b") == "bb"\')',
    ),
    "executed tests alone": ("def f(x):\n    return x * x", "exec('assert f(2) == 4')"),
    "pickled data": (
        "import pickle\ndef f(x, protocol):\n    return pickle.dumps(x, protocol)",
        "import pickle, datetime\n"
        "for protocol in range(pickle.HIGHEST_PROTOCOL + 1):\n"
        "    for x in ([1, {'a': (2,)}], {3}, frozenset([4]), 1j, b'x', bytearray(b'y'), \n"
        "              datetime.date(2020, 1, 2)):\n"
        "        assert pickle.loads(f(x, protocol)) == x",
    ),
    "own name of a builtin exception": (
        "Missing = LookupError\ndef f(x):\n    return {1: 2}[x]",
        "import unittest\ntry:\n    f(3)\n    assert False\nexcept Missing as error:\n"
        "    assert type(error) is KeyError and error.args == (3,)\n"
        "with unittest.TestCase().assertRaises(Missing): f(4)\n"
        "assert f(1) == 2",
    ),
}
