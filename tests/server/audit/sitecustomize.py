"""Notes what a process and its children open, connect to, resolve and start, in the file that AUDIT_LOG names.

Python imports this by itself where the folder is on its path. Every line is "PID EVENT WHAT".
"""

import os
import sys

_NOTED = {
    "open": 0,
    "os.listdir": 0,
    "os.scandir": 0,
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.bind": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "subprocess.Popen": 0,
    "os.exec": 0,
    "os.system": 0,
    "os.remove": 0,
    "os.rename": 0,
    "os.mkdir": 0,
    "os.symlink": 0,
    "urllib.Request": 0,
}

if "AUDIT_LOG" in os.environ:
    _LOG = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _note(event, arguments):
        place = _NOTED.get(event)
        if place is not None:
            what = arguments[place] if len(arguments) > place else None
            if event == "open" and arguments[2] & os.O_NOFOLLOW:
                event = "open-below"  # a name in a folder that was opened before, if it is no path
            os.write(_LOG, f"{os.getpid()} {event} {what!a}\n".encode())

    sys.addaudithook(_note)
