"""A scripted gcloud: one process a call, its world in a JSON file beside it. Imitates queued resources, ssh and scp.

Each creation takes the next of the world's `lives`: its `states` are the answers of describe in turn, its `status` the
workers' lines; the last of each stays. `refuse` holds [verb, error] for calls to fail once; `calls` collects arguments.
"""

import json
import sys
from pathlib import Path

WORLD = Path(__file__).resolve().with_name("world.json")


def main() -> int:
    world = json.loads(WORLD.read_text())
    arguments = sys.argv[1:]
    verb = arguments[3] if arguments[:3] == ["compute", "tpus", "queued-resources"] else "?"
    command = next((a.partition("=")[2] for a in arguments if a.startswith("--command=")), "")
    what = f"ssh {command.split('worker.sh ')[1].split()[0]}" if "worker.sh " in command else verb
    world["calls"].append(arguments)
    status, out, err = answer(world, verb, what)
    save(world)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return status


def save(world):
    """At once or not at all: the launcher may end this process at any time."""
    fresh = WORLD.with_suffix(".new")
    fresh.write_text(json.dumps(world))
    fresh.replace(WORLD)


def answer(world, verb, what):
    for i, (refused, message) in enumerate(world["refuse"]):
        if refused == what:
            del world["refuse"][i]
            return 1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) {message}\n"
    if verb == "?":
        return 2, "", "ERROR: (gcloud) Invalid choice\n"
    if verb == "create":
        if world["alive"]:
            return 1, "", "ERROR: ALREADY_EXISTS: Resource already exists\n"
        world["life"] += 1
        world["alive"] = True
        world["states"] = list(world["lives"][world["life"]]["states"])
        world["status"] = list(world["lives"][world["life"]].get("status", []))
        return 0, "", "Create request issued\n"
    if not world["alive"]:
        return 1, "", "ERROR: NOT_FOUND: Resource was not found\n"
    if verb == "describe":
        states = world["states"]
        state = {"state": states.pop(0) if len(states) > 1 else states[0]}
        if state["state"] == "FAILED":
            state["failedData"] = {"error": {"message": world["why"]}}
        return 0, json.dumps({"name": "projects/p/locations/z/queuedResources/r", "state": state}), ""
    if verb == "delete":
        world["alive"] = False
        return 0, "", ""
    if what == "ssh status":
        lines = world["status"].pop(0) if len(world["status"]) > 1 else world["status"][0]
        if lines == "gone":
            world["states"] = ["SUSPENDED"]
            return 1, "", "ERROR: [/usr/bin/ssh] exited with return code [255].\n"
        return 0, "".join(f"JVLM-STATUS worker=w-{i} {line}\n" for i, line in enumerate(lines)), ""
    if what == "ssh log":
        text = "step 1 loss 2.5\n"
        offset = int(next(a for a in world["calls"][-1] if a.startswith("--command=")).split()[-1])
        return 0, f"JVLM-LOG {len(text)}\n{text[offset:]}", ""
    if what == "ssh tail":
        return 0, "Traceback\nValueError: row 7 has no image\n", ""
    return 0, "", ""


sys.exit(main())
