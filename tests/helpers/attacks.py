"""Programs that try to pass without a solution, or to leave their limits.

Each has a function ``f`` that returns the right value only if its attack has worked. ``SECRET`` is
in the tests alone; programs get the paths and the process id in `PLACES`.
"""

SECRET = "kq7-violet-4"
SECRET_TESTS = f"expected = {SECRET!r}\nassert f(2) == expected"
SQUARE_TESTS = "assert f(2) == 4\nassert f(3) == 9"
PLACES = ("{precious}", "{answers}", "{trainer}", "{shared}", "{semaphore}", "{queue}")

_SQUARE = "\ndef f(x): return x * x\n"
_FROM_TEXT = (
    "\ndef find(text):\n    import re\n"
    "    return re.search('kq7' + '-[a-z]+-[0-9]', text).group()\n"
)

# Every attack: the program, and a text of its output that shows what stopped it.
FILES = {
    "read a system file": ("open('/etc/passwd').read()" + _SQUARE, "PermissionError"),
    "read the answers": (
        _FROM_TEXT + "def f(x): return find(open('{answers}').read())",
        "PermissionError",
    ),
    "list a folder": ("import os; os.listdir('/tmp')" + _SQUARE, "PermissionError"),
    "read the answers through a link": (
        "import os; os.symlink('{answers}', 'link'); open('link')" + _SQUARE,
        "PermissionError",
    ),
    "read a device": ("open('/dev/sda', 'rb'); open('/dev/mem', 'rb')" + _SQUARE, "Error"),
    "overwrite a file": ("open('{precious}', 'w').write('x')" + _SQUARE, "PermissionError"),
    "truncate a file": ("import os; os.truncate('{precious}', 0)" + _SQUARE, "PermissionError"),
    "remove a file": ("import os; os.unlink('{precious}')" + _SQUARE, "PermissionError"),
    "rename a file": (
        "import os; os.rename('{precious}', '{precious}.x')" + _SQUARE,
        "PermissionError",
    ),
    "chmod a file": ("import os; os.chmod('{precious}', 0o777)" + _SQUARE, "PermissionError"),
    "set times of a file": ("import os; os.utime('{precious}', (0, 0))" + _SQUARE, "Permission"),
    "change Python's library": (
        "import os; open(os.__file__, 'a').write('x')" + _SQUARE,
        "PermissionError",
    ),
}
ENVIRONMENT = {
    "environment variables": (
        _FROM_TEXT + "import os\ndef f(x): return find(str(dict(os.environ)))",
        "NoneType",
    ),
    "environment of the trainer": (
        _FROM_TEXT + "def f(x): return find(open('/proc/{trainer}/environ').read())",
        "PermissionError",
    ),
    "arguments of the trainer": (
        _FROM_TEXT + "def f(x): return find(open('/proc/{trainer}/cmdline').read())",
        "PermissionError",
    ),
    "environment in C": (
        _FROM_TEXT + "import ctypes\nc = ctypes.CDLL(None); c.getenv.restype = ctypes.c_char_p\n"
        "def f(x): return find((c.getenv(b'SANDBOX_SECRET') or b'').decode())",
        "NoneType",
    ),
}
NETWORK = {
    "TCP": ("import socket; socket.socket()" + _SQUARE, "PermissionError"),
    "UDP": (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)" + _SQUARE,
        "PermissionError",
    ),
    "Unix socket": ("import socket; socket.socket(socket.AF_UNIX)" + _SQUARE, "PermissionError"),
    "URL": (
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:80')" + _SQUARE,
        "Error",
    ),
    "connect a socket pair": (
        "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.connect('\\0trainer')" + _SQUARE,
        "PermissionError",
    ),
    "send from a socket pair": (
        "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', '\\0trainer')" + _SQUARE,
        "PermissionError",
    ),
    "io_uring": (
        "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0" + _SQUARE,
        "AssertionError",
    ),
}
PROCESSES = {
    "fork": ("import os\nwhile True: os.fork()" + _SQUARE, "PermissionError"),
    "subprocess": ("import subprocess; subprocess.run(['ls'])" + _SQUARE, "PermissionError"),
    "posix_spawn": (
        "import os; os.posix_spawn('/bin/true', ['true'], {{}})" + _SQUARE,
        "PermissionError",
    ),
    "multiprocessing": (
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()"
        + _SQUARE,
        "PermissionError",
    ),
    "execute a shell": ("import os; os.execv('/bin/sh', ['sh'])" + _SQUARE, "PermissionError"),
    "clone in C": (
        "import ctypes; assert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0" + _SQUARE,
        "AssertionError",
    ),
    "new session": ("import os; os.setsid()" + _SQUARE, "PermissionError"),
    "kill the trainer": ("import os; os.kill({trainer}, 9)" + _SQUARE, "PermissionError"),
    "signal through a pipe": (
        "import os, fcntl; r, w = os.pipe(); fcntl.fcntl(r, 10, 9)\n"
        "fcntl.fcntl(r, fcntl.F_SETOWN, {trainer})" + _SQUARE,
        "PermissionError",
    ),
    "trace the trainer": (
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, {trainer}, 0, 0) == 0" + _SQUARE,
        "AssertionError",
    ),
    "read the trainer's memory": (
        "open('/proc/{trainer}/mem', 'rb')" + _SQUARE,
        "PermissionError",
    ),
    "take the trainer's descriptors": (
        "import os; os.pidfd_open({trainer})" + _SQUARE,
        "PermissionError",
    ),
    "limit the trainer": (
        "import resource as r; r.prlimit({trainer}, r.RLIMIT_CPU, (1, 1))" + _SQUARE,
        "PermissionError",
    ),
    "limit the trainer by a pointer whose low half is 0": (
        "import ctypes; c = ctypes.CDLL(None); c.mmap.restype = ctypes.c_void_p\n"
        "p = c.mmap(ctypes.c_void_p(1 << 32), 4096, 3, 0x32, -1, 0)\n"
        "if p != 1 << 32: raise SystemExit\n"
        "c.syscall.argtypes = [ctypes.c_long] * 5\n"
        "assert c.syscall(302, {trainer}, 0, p, 0) == 0" + _SQUARE,
        "AssertionError",
    ),
    "fork by the 32-bit table": (
        "import ctypes, mmap; m = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b802000000cd80c3'))\n"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "assert ctypes.CFUNCTYPE(ctypes.c_int)(a)() >= 0" + _SQUARE,
        "AssertionError",
    ),
    "fork by the x32 table": (
        "import ctypes; assert ctypes.CDLL(None).syscall((1 << 30) | 57) >= 0" + _SQUARE,
        "AssertionError",
    ),
    "user namespace": (
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0" + _SQUARE,
        "AssertionError",
    ),
    "outlive the trainer": (
        "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0" + _SQUARE,
        "AssertionError",
    ),
    "raise a limit": (
        "import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))" + _SQUARE,
        "Error",
    ),
}
MEMORY = {
    "one large object": ("x = bytearray(10 << 30)" + _SQUARE, "MemoryError"),
    "many objects": ("x = []\nwhile True: x.append(bytearray(1 << 24))" + _SQUARE, "MemoryError"),
    "anonymous mapping": ("import mmap; mmap.mmap(-1, 4 << 30)" + _SQUARE, "Error"),
    "System V memory of the trainer": (
        "import ctypes\nc = ctypes.CDLL(None); c.shmat.restype = ctypes.c_void_p\n"
        "assert c.shmat({shared}, None, 0) != 2 ** 64 - 1" + _SQUARE,
        "AssertionError",
    ),
    "remove the System V memory of the trainer": (
        "import ctypes; assert ctypes.CDLL(None).shmctl({shared}, 0, None) == 0" + _SQUARE,
        "AssertionError",
    ),
    "remove the semaphore of the trainer": (
        "import ctypes; assert ctypes.CDLL(None).semctl({semaphore}, 0, 0) == 0" + _SQUARE,
        "AssertionError",
    ),
    "message to the trainer": (
        "import ctypes\ntext = ctypes.create_string_buffer(bytes([1]) + bytes(15))\n"
        "assert ctypes.CDLL(None).msgsnd({queue}, text, 8, 0) == 0" + _SQUARE,
        "AssertionError",
    ),
    "memory file": ("import os; os.memfd_create('x')" + _SQUARE, "PermissionError"),
    "shared memory": (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "SharedMemory(create=True, size=1 << 30)" + _SQUARE,
        "PermissionError",
    ),
    "System V memory": (
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) >= 0" + _SQUARE,
        "AssertionError",
    ),
    "file in memory": ("open('/dev/shm/x', 'wb').write(b'x')" + _SQUARE, "PermissionError"),
}
DISK = {
    "file in the working folder": ("open('x', 'w').write('x')" + _SQUARE, "PermissionError"),
    "temporary file": ("import tempfile; tempfile.TemporaryFile()" + _SQUARE, "FileNotFoundError"),
    "unlinked open files": (
        "import os; x = [os.open('/tmp', os.O_TMPFILE | os.O_RDWR) for _ in range(50)]"
        "\nfor i in x: os.write(i, bytes(1 << 24))" + _SQUARE,
        "PermissionError",
    ),
    "3000 nested folders": (
        "import os\nfor _ in range(3000): os.mkdir('{precious}.x'); os.chdir('{precious}.x')"
        + _SQUARE,
        "PermissionError",
    ),
    "endless folders": (
        "import os, itertools\nfor i in itertools.count(): os.mkdir(f'{precious}{{i}}')" + _SQUARE,
        "PermissionError",
    ),
}
TIME_AND_OUTPUT = {
    "endless loop": ("while True: pass" + _SQUARE, "ended"),
    "endless loop without the signal": (
        "import signal; signal.signal(24, signal.SIG_IGN)\nwhile True: pass" + _SQUARE,
        "ended",
    ),
    "endless call": ("def f(x):\n    while True: pass", "ended"),
    "slow expression": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')" + _SQUARE, "ended"),
    "endless output": ("while True: print('x' * 100_000)" + _SQUARE, "xxx"),
    "endless errors": (
        "import sys\nwhile True: sys.stderr.write('x' * 100_000)" + _SQUARE,
        "xxx",
    ),
    "many threads": (
        "import threading, time; threading.stack_size(32768)\n"
        "for _ in range(2000): threading.Thread(target=time.sleep, args=(9,)).start()" + _SQUARE,
        "",
    ),
    "huge result": ("def f(x): return 'x' * (20 << 20)", "malformed"),
    "endless result": (
        "import itertools\ndef f(x): return itertools.repeat(4)\n"
        "class list: __eq__ = lambda s, o: True",
        "",
    ),
}
IMPORTS = {
    "patched compile": (
        "import builtins; builtins.compile = lambda *a, **k: (lambda: 0).__code__\n"
        "builtins.exec = lambda *a: None\ndef f(x): pass",
        "AssertionError",
    ),
    "patched import": (
        "import builtins; builtins.__import__ = lambda *a, **k: 1 / 0\ndef f(x): return 0",
        "AssertionError",
    ),
    "import hook": (
        "import sys\nclass Hook:\n    def find_spec(*a): raise SystemExit(0)\n"
        "sys.meta_path.insert(0, Hook()); sys.modules.clear()\ndef f(x): return 0",
        "AssertionError",
    ),
    "patched AssertionError": (
        "import builtins; builtins.AssertionError = type('E', (Exception,), {{}})\n"
        "def f(x): return 0",
        "AssertionError",
    ),
    "patched json": (
        "import json; json.dumps = lambda *a, **k: '{{\"passed\": true}}'\ndef f(x): return 0",
        "malformed",
    ),
    "patched codec": (
        "import sys, sandbox.plain as p\nsys.modules['sandbox.checker'] = p\n"
        "p.encode = lambda *a: 4\ndef f(x): return 0",
        "AssertionError",
    ),
    "trace function": (
        "import sys; sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\n"
        "sys.addaudithook(lambda *a: None)\ndef f(x): return 0",
        "AssertionError",
    ),
}
FRAMES = {
    "frames of the caller": (
        _FROM_TEXT + "import sys\ndef f(x):\n    frame, text = sys._getframe(), ''\n"
        "    while frame:\n        text += repr(frame.f_locals) + repr(frame.f_globals)\n"
        "        frame = frame.f_back\n    return find(text)",
        "NoneType",
    ),
    "all objects": (
        _FROM_TEXT + "import gc\n"
        "def f(x): return find(''.join(o for d in gc.get_objects() for o in "
        "(d.values() if type(d) is dict else ()) if type(o) is str))",
        "NoneType",
    ),
    "frames of threads": (
        _FROM_TEXT + "import sys\ndef f(x): return find(repr([f.f_locals for f in "
        "sys._current_frames().values()]))",
        "NoneType",
    ),
    "frames of an exception": (
        _FROM_TEXT + "class E:\n    def __eq__(self, other):\n        return other\n"
        "def f(x):\n    try: 1 / 0\n    except Exception as e:\n"
        "        frame = e.__traceback__.tb_frame.f_back\n"
        "        return find(repr(frame.f_locals) + repr(frame.f_back.f_locals))",
        "NoneType",
    ),
    "own memory": (
        _FROM_TEXT + "def f(x): return find(open('/proc/self/mem', 'rb').read().decode())",
        "PermissionError",
    ),
    "standard input": (
        _FROM_TEXT + "import sys, os\ndef f(x): return find(os.read(0, 10 ** 6).decode())",
        "NoneType",
    ),
    "open descriptors": (
        _FROM_TEXT + "import os, fcntl\ndef f(x):\n    text = ''\n    for i in range(64):\n"
        "        try:\n            fcntl.fcntl(i, 4, os.O_NONBLOCK)\n"
        "            text += os.read(i, 10 ** 6).decode()\n        except OSError: pass\n"
        "    return find(text)",
        "NoneType",
    ),
}
_UNITTEST = (
    "import unittest\nclass T(unittest.TestCase):\n"
    "    def test(self): self.assertEqual(f(2), 4)\nunittest.{}"
)
_ALWAYS_EQUAL = (
    "class E({}):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
    "    __lt__ = __gt__ = __le__ = __ge__ = __eq__\n    __hash__ = lambda s: 4\n"
    "    __sub__ = __rsub__ = lambda s, o: 0\n    __abs__ = lambda s: 0\n"
)
EQUALITY = {
    "object equal to all": (_ALWAYS_EQUAL.format("") + "def f(x): return E()", "AssertionError"),
    "number equal to all": (
        _ALWAYS_EQUAL.format("int") + "def f(x): return E(7)",
        "AssertionError",
    ),
    "text equal to all": (_ALWAYS_EQUAL.format("str") + "def f(x): return E('')", "AssertionError"),
    "list equal to all": (_ALWAYS_EQUAL.format("list") + "def f(x): return E()", "AssertionError"),
    "exception equal to all": (
        _ALWAYS_EQUAL.format("Exception") + "def f(x): raise E(4)",
        "E: 4",
    ),
    "class of another": (
        "class M(type):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\n"
        "    __instancecheck__ = lambda s, o: True\n"
        "class E(metaclass=M):\n    __class__ = int\ndef f(x): return E",
        "AssertionError",
    ),
    "function equal to all": (
        "class F:\n    def __call__(self, x): return self\n    __eq__ = lambda s, o: True\nf = F()",
        "AssertionError",
    ),
}
_CASES = "for value, right in zip(map({}, (2, 3)), (4, 9)):\n    assert value == right"
WEAK_TESTS = {
    "end of the iteration by a method": (
        "class S:\n    def f(self, x): raise StopIteration",
        "the program raised StopIteration",
        _CASES.format("S().f"),
    ),
    "end of the iteration by the function of a factory": (
        "def make():\n    def f(x): raise type('Stop', (StopIteration,), {{}})\n    return f",
        "the program raised StopIteration",
        _CASES.format("make()"),
    ),
    "end of the iteration by a property": (
        "class S:\n    __init__ = lambda s, x: None\n    @property\n"
        "    def f(self): raise StopIteration",
        "the program raised StopIteration",
        _CASES.format("lambda x: S(x).f"),
    ),
    "end of the iteration by an operator": (
        "class S:\n    def __neg__(self): raise StopIteration\ndef f(x): return S()",
        "the program raised StopIteration",
        _CASES.format("lambda x: -f(x)"),
    ),
    "end of the iteration by a text": (
        "class S:\n    def __str__(self): raise StopIteration\ndef f(x): return S()",
        "the program raised StopIteration",
        _CASES.format("lambda x: str(f(x))"),
    ),
    "exit under a caught exception": (
        "def f(x): raise SystemExit(0)\ndef g(): raise ValueError",
        "SystemExit",
        "try: f(2)\nfinally:\n    try: g()\n    except ValueError: pass",
    ),
    "memory of the tests": (
        "class E:\n    __array_interface__ = {{'shape': (0,), 'typestr': '<f8', 'version': 3,\n"
        "        'data': (4096, False)}}\ndef f(x): return E()",
        "TypeError",
        "import numpy as np\nassert np.allclose(f(2), 4.0)",
    ),
    "skipped test": (
        "import unittest\ndef f(x): raise unittest.SkipTest('no')",
        "SkipTest",
        _UNITTEST.format("main()"),
    ),
    "exit of a test case": (
        "def f(x): raise SystemExit(0)",
        "SystemExit",
        _UNITTEST.format("main()"),
    ),
    "test case that is not found": (
        "def f(x): return 5",
        "5 != 4",
        _UNITTEST.format("main(exit=False).result.wasSuccessful() or 1 / 0"),
    ),
    "documentation test that is not found": (
        "def f(x): return 5",
        "AssertionError",
        "import doctest\ndef t():\n    '''\n    >>> f(2)\n    4\n    '''\n"
        "assert not doctest.testmod().failed",
    ),
    "end of the iteration over the cases": (
        "def f(x): raise StopIteration",
        "the program raised StopIteration",
        "cases = {{2: 4, 3: 9}}\nfor value, right in zip(map(f, cases), cases.values()):\n"
        "    assert value == right",
    ),
    # Program, text of the output, tests that a program in the same process could satisfy.
    "difference": (
        _ALWAYS_EQUAL.format("") + "def f(x): return E()",
        "TypeError",
        "assert abs(f(2) - 4) < 1e-6",
    ),
    "membership": (
        _ALWAYS_EQUAL.format("") + "def f(x): return E()",
        "AssertionError",
        "assert f(2) in (4, 5) or f(2) in {{4}}",
    ),
    "order": (
        _ALWAYS_EQUAL.format("") + "def f(x): return E()",
        "TypeError",
        "assert 3 < f(2) < 5",
    ),
    "shadowed builtins": (
        "abs = len = sum = lambda *a: 0\nall = isinstance = lambda *a: True\ndef f(x): return 9",
        "AssertionError",
        "assert isinstance(f(2), int) and abs(f(2) - 4) < 1e-6",
    ),
    "shadowed module": (
        "class math: isclose = lambda *a, **k: True\ndef f(x): return 9",
        "AssertionError",
        "assert math.isclose(f(2), 4)",
    ),
    "globals of a function of the tests": (
        _FROM_TEXT + "def f(g): return find(repr(g.__globals__) + repr(g.__closure__))",
        "AttributeError",
        f"expected = {SECRET!r}\nassert f(lambda: 0) == expected",
    ),
    "caught end": (
        "import os\ndef f(x): os._exit(0)",
        "ended before its tests",
        "try: f(2)\nexcept BaseException: pass",
    ),
    "answers in advance": (
        "import os\nfor i in range(3, 10):\n"
        "    try: os.write(i, b'{{\"ready\": true}}\\n')\n    except OSError: pass\n"
        "os._exit(0)",
        "ended before its tests",
        "try: f(2)\nexcept BaseException: pass",
    ),
    "patched list of the tests": (
        "def f(x): x.clear()\n",
        "AttributeError",
        "rows = [1, 2]\nf(tuple(rows))\nassert not rows",
    ),
}
_EXPECTS_E = "try:\n    f(-1)\n    assert False\nexcept {}:\n    pass"
WEAK_TESTS |= {
    "own name of AssertionError": (
        "E = AssertionError\ndef f(x): pass",
        "AssertionError",
        _EXPECTS_E.format("E"),
    ),
    "own name of Exception in a class": (
        "class f:\n    E = Exception\n    def __init__(self, x): pass",
        "AssertionError",
        _EXPECTS_E.format("f.E"),
    ),
    "own names of exceptions in a tuple": (
        "E = (ValueError, BaseException)\ndef f(x): pass",
        "AssertionError",
        _EXPECTS_E.format("E"),
    ),
    "own name of an exception after an exception": (
        "E = BaseException\ndef f(x): raise ValueError",
        "AssertionError",
        "try: f(2)\nexcept ValueError:\n    try: assert False\n    except E: pass",
    ),
    "end of the iteration over a class of the tests": (
        "def f(x): raise IndexError",
        "the program raised IndexError",
        "class Cases:\n    def __getitem__(self, i): return f((2, 3)[i]), (4, 9)[i]\n"
        "for value, right in Cases():\n    assert value == right",
    ),
    "end of an asynchronous iteration": (
        "def f(x): raise StopAsyncIteration",
        "the program raised StopAsyncIteration",
        "import asyncio\nclass Values:\n    __aiter__ = lambda self: self\n"
        "    async def __anext__(self): return f(2)\n"
        "async def main():\n    async for value in Values(): assert value == 4\n"
        "asyncio.run(main())",
    ),
    "own exec": (
        "def exec(*a): pass\ndef f(x): return 0",
        "AssertionError",
        "exec('assert f(2) == 4')",
    ),
    "own eval": ("eval = lambda t: True\ndef f(x): return 0", "Error", "assert eval('f(2) == 4')"),
    "evaluated exit": (
        "def f(x): return '__import__(\"os\")._exit(0)'",
        "the tests execute text",
        "assert eval(f(24)) == 24",
    ),
    "evaluated name of the tests": (
        "def f(x): return 'expected'",
        "the tests execute text",
        "expected = 24\nassert eval(f(2)) == expected",
    ),
    "evaluated attributes": (
        "def f(x): return '().__class__.__base__.__subclasses__()'",
        "the tests execute text",
        "assert eval(f(24)) == 24",
    ),
    "evaluated by a function of the tests": (
        "def f(run, text): return run('__import__(\"os\")._exit(0)')",
        "the tests execute text",
        "assert f(eval, '2 + 2') == 4",
    ),
    "executed exit": (
        "def f(x): return b'import os; os._exit(0)'",
        "the tests execute text",
        "names = {{}}\nexec(f(2), names)\nassert names['x'] == 4",
    ),
    "compiled exit": (
        "def f(x): return 'import os; os._exit(0)'",
        "the tests execute text",
        "exec(compile(f(2), 'x', 'exec'))\nassert x == 4",
    ),
    "pickled exit": (
        "def f(x): return b'cposix\\n_exit\\n(I0\\ntR.'",
        "posix._exit from bytes",
        "import pickle\nassert pickle.loads(f(24)) == 24",
    ),
    "marshaled exit": (
        "import marshal\n"
        "def f(x): return marshal.dumps(compile('import os; os._exit(0)', 'x', 'exec'))",
        "load code from bytes",
        "import marshal\nexec(marshal.loads(f(24)))\nassert x == 24",
    ),
}
_EXIT_AS_TEXT = "class E:\n    def __str__(self): raise SystemExit(0)\n    {} = __str__\n"
EXITS = {
    "exit by the line of a syntax error": (
        _EXIT_AS_TEXT.format("__repr__")
        + "def f(x): raise SyntaxError('x', ('file', E(), 1, 'text'))",
        "cannot be shown",
    ),
    "exit by the text of a syntax error": (
        _EXIT_AS_TEXT.format("__getattr__") + "def f(x): raise SyntaxError('x', (E(), 1, 1, E()))",
        "cannot be shown",
    ),
    "exit by the argument of an exception": (
        _EXIT_AS_TEXT.format("__repr__") + "def f(x): raise OSError(E(), E(), E())",
        "failed>",
    ),
    "subclass of SystemExit": (
        "class S(SystemExit): code = 0\ndef f(x): raise S(0)",
        "S: 0",
    ),
    "exit by the arguments of an exception": (
        "class E(BaseException):\n    @property\n    def args(self): raise SystemExit(0)\n"
        "def f(x): raise E()",
        "ended before its tests",
    ),
    "exit by the garbage collector": (
        "import gc, os; gc.callbacks.append(lambda *a: os._exit(0))\ndef f(x): gc.collect()",
        "ended before its tests",
    ),
    "abort": ("import os\ndef f(x): os.abort()", "ended before its tests"),
    "invalid memory": ("import ctypes\ndef f(x): ctypes.string_at(0)", "ended before its tests"),
    "sys.exit": ("import sys; sys.exit(0)", "ended before its tests"),
    "os._exit": ("import os; os._exit(0)", "ended before its tests"),
    "sys.exit in a call": ("import sys\ndef f(x): sys.exit(0)", "SystemExit"),
    "os._exit in a call": ("import os\ndef f(x): os._exit(0)", "ended before its tests"),
    "exit handler": (
        "import atexit, os; atexit.register(lambda: os._exit(0)); raise SystemExit(0)",
        "ended before its tests",
    ),
    "own signal": (
        "import signal, os, sys\nsignal.signal(14, lambda *a: os._exit(0)); signal.alarm(1)\n"
        "def f(x):\n    while True: pass",
        "ended before its tests",
    ),
    "thread that outlives": (
        "import threading, time, os\n"
        "threading.Thread(target=lambda: (time.sleep(.1), os._exit(0))).start()\nraise SystemExit",
        "ended before its tests",
    ),
    "endless clean-up": (
        "import atexit\n@atexit.register\ndef loop():\n    while True: pass\nraise SystemExit(0)",
        "",
    ),
}
FAKES = {
    "printed result": ("print('passed'); print('{{\"passed\": true}}'); raise SystemExit", "ended"),
    "text in every descriptor": (
        "import os\nfor i in range(64):\n    try: os.write(i, b'{{\"passed\": true}}\\n')\n"
        "    except OSError: pass\ndef f(x): return 0",
        "malformed",
    ),
    "forged class": (
        "import sys, json\ndef f(x):\n    channel = sys._getframe(2).f_locals['self'].channel\n"
        "    channel.send({{'raise': {{'builtin exception': 'exit'}}, 'arguments': [0]}})",
        "malformed",
    ),
    "forged value": (
        "import sys\ndef f(x):\n    channel = sys._getframe(2).f_locals['self'].channel\n"
        "    channel.send({{'value': {{'datetime.sys.exit': [0]}}}})",
        "malformed",
    ),
    "forged callback": (
        "import sys\ndef f(x):\n    channel = sys._getframe(2).f_locals['self'].channel\n"
        "    channel.send({{'callback': -1, 'arguments': [], 'keywords': {{}}}})",
        "malformed",
    ),
    "deep value": (
        "import sys, os\ndef f(x):\n    channel = sys._getframe(2).f_locals['self'].channel\n"
        "    channel._writer.write(b'[' * 10 ** 6 + b'\\n'); channel._writer.flush()",
        "malformed",
    ),
    "exhausted memory of the tests": (
        "import sys\ndef f(x):\n    channel = sys._getframe(2).f_locals['self'].channel\n"
        "    channel._writer.write(b'[' + b'[],' * (5 << 20) + b'[]]\\n')\n"
        "    channel._writer.flush()",
        "malformed",
    ),
    "closed channel": ("import os; os.closerange(3, 64)\ndef f(x): return 4", "ended"),
}

SECRET_GROUPS = [ENVIRONMENT, FRAMES]
SQUARE_GROUPS = [
    *(FILES, NETWORK, PROCESSES, MEMORY, DISK, TIME_AND_OUTPUT),
    *(IMPORTS, EQUALITY, EXITS, FAKES),
]
ATTACKS: dict[str, tuple[str, str, str]] = {
    name: (program, trace, tests)
    for groups, tests in ((SECRET_GROUPS, SECRET_TESTS), (SQUARE_GROUPS, SQUARE_TESTS))
    for group in groups
    for name, (program, trace) in group.items()
} | WEAK_TESTS
