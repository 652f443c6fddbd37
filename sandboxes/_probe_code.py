"""What a probe runs inside a box: each of these tries to break something, and prints how far it came.

Standard library only; they run as the agent's code does. Invariant: one that did not run prints nothing, so that
silence is never taken for containment.
"""

from __future__ import annotations

PROCESSES = 12
FLOOD_FILES = 20_000
REACH = """
import ctypes, json, os, socket, sys
host = json.loads(sys.stdin.read())
libc = ctypes.CDLL(None, use_errno=True)
reached = {}
def attempt(name, action):
    try:
        done = action()
    except OSError:
        done = False
    reached[name] = bool(reached.get(name)) or done is not False
def call(number, *arguments):
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), "")
def can_write(path):
    os.close(os.open(path, os.O_WRONLY))
def sees_process():
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if host["marker"].encode() in open(f"/proc/{entry}/cmdline", "rb").read():
                    return True
            except OSError:
                pass
    return False
def field(name):
    return open("/proc/self/status").read().partition(name + ":")[2].split()[0]
def connect(address, family=socket.AF_INET, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as sock:
        sock.settimeout(2)
        sock.connect(address)
attempt("host_files", lambda: open(host["secret"]).close())
attempt("host_files", lambda: can_write("/etc/passwd"))
attempt("host_files", lambda: can_write(json.__file__))
attempt("host_processes", sees_process)
for address in host["addresses"]:
    attempt("network", lambda: connect((address, host["port"])))
attempt("network", lambda: connect("\\0" + host["abstract"], socket.AF_UNIX))
# addresses for documentation: nothing is sent, the kernel only tells whether it would know a way
attempt("network", lambda: connect(("192.0.2.1", 9), kind=socket.SOCK_DGRAM))
attempt("network", lambda: connect(("2001:db8::1", 9), socket.AF_INET6, socket.SOCK_DGRAM))
attempt("kernel", lambda: int(field("CapBnd"), 16) > 0)
attempt("kernel", lambda: field("NoNewPrivs") != "1")
attempt("kernel", lambda: field("Seccomp") != "2")
attempt("kernel", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close())
if os.uname().machine == "x86_64":
    attempt("kernel", lambda: call(272, 0x10000000))
    attempt("kernel", lambda: call(250, 0, -3, 0))
server = os.getppid()
for path in ("environ", "mem", "fd/0", "fd/3"):
    attempt("honest_answers", lambda: open(f"/proc/{server}/{path}", "rb").close())
attempt("honest_answers", lambda: server != 1)
print(json.dumps(reached))
"""
FORKS = """
import os, time
count = 0
try:
    for count in range(3 * LIMIT):
        if os.fork() == 0:
            time.sleep(30)
except OSError:
    pass
print(count)
""".replace("LIMIT", str(PROCESSES))
HOLD = """
import os, time
children = {}
for _ in range(2):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        data = bytearray(64 << 20)
        os.write(writer, b"x")
        time.sleep(30)
    os.close(writer)
    children[pid] = reader
for reader in children.values():
    os.read(reader, 1)
# one may have been killed to make room for the other
ends = [os.waitpid(pid, os.WNOHANG) for pid in children]
print(sum(pid == 0 for pid, _ in ends), sum(pid != 0 and os.WIFSIGNALED(how) for pid, how in ends))
"""
PLACES = ("/tmp", "/var/tmp", "/run", "/dev/shm")
FILL = """
import os, sys
told = sys.stdin.read()
sizes = []
for place in (".", PLACES):
    names = [f"{place}/{told}/{number}" for number in range(3)]
    size = 0
    try:
        os.mkdir(f"{place}/{told}")
        for name in names:
            with open(name, "wb", buffering=0) as file:
                for _ in range(4):
                    size += file.write(bytes(1 << 20))
    except OSError:
        pass
    for name in names:
        if os.path.exists(name):
            os.unlink(name)
    sizes.append(size)
print(max(sizes))
""".replace("PLACES", ", ".join(map(repr, PLACES)))
FLOOD = """
import os, sys
told = sys.stdin.read()
counts = []
for place in (".", PLACES):
    names = [f"{place}/{told}/{number}" for number in range(MOST)]
    made = 0
    try:
        os.mkdir(f"{place}/{told}")
        for name in names:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT))
            made += 1
    except OSError:
        pass
    for name in names[:made]:
        os.unlink(name)
    counts.append(made)
print(max(counts))
""".replace("MOST", str(FLOOD_FILES)).replace("PLACES", ", ".join(map(repr, PLACES)))
LOCK = """
import fcntl, os, sys
folder = os.path.dirname(os.__file__)
names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
fd = os.open(os.path.join(folder, names[int(sys.argv[1]) % len(names)]), os.O_RDONLY)
try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("taken")
else:
    print("free", flush=True)
    if sys.argv[2:] == ["hold"]:
        import time
        time.sleep(60)
"""
FETCH = """
import sys, urllib.error, urllib.request
for url in sys.stdin.read().split():
    try:
        print(urllib.request.urlopen(url, timeout=10).status)
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError as error:
        print(0)
"""
