#!/usr/bin/env bash
# trackio 0.43.0, local project, 2026-11-29.
# A run logs 6,000 steps; the loss is 1, and 9 at step 3,001. The database and `trackio get metric` have all of them. What the
# dashboard asks its server for (`get_logs_batch`, at most 3,000 points unless said otherwise) is every 4th step: 1,501 points,
# and no 9 among them. The stride is a power of two and the last step is always sent, so a run of one point too many loses half
# of them: asked for 5,999 points the server sends 3,001, asked for 6,000 it sends all.
# Expected: as many points as asked for, or the lowest and highest of each stretch.
# Why it matters: past 3,000 steps a spike of the loss, or the step where it became NaN, is most likely not in the plot.
# Way out: look for spikes with `trackio get metric` or `trackio query`, which read every row.
# Upstream: gradio-app/trackio issues 543 and 653 led to this sampling, for plots that flickered; nothing known of spikes.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq --only-binary :all: trackio==0.43.0
cd "$tmp"
export TRACKIO_DIR="$tmp/projects" HOME="$tmp"
cat > seen.py <<'PY'
import json
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import trackio

trackio.init(project="long", name="run", embed=False)
for step in range(6000):
    trackio.log({"loss": 9.0 if step == 3001 else 1.0}, step=step)
trackio.finish()

command = [str(Path(sys.executable).parent / "trackio"), "get", "metric", "--project", "long", "--run", "run", "--metric", "loss", "--json"]
rows = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)["values"]
seen = {"stored": [len(rows), max(row["value"] for row in rows)]}

shown = trackio.show(project="long", open_browser=False, block_thread=False)
url = next(part for part in shown if isinstance(part, str) and part.startswith("http"))
for points in (None, 5999, 6000):
    question = json.dumps({"project": "long", "runs": [{"run": "run"}], "max_points": points}).encode()
    request = Request(url.split("?")[0].rstrip("/") + "/api/get_logs_batch", question, {"Content-Type": "application/json"})
    logs = json.load(urlopen(request))["data"][0]["logs"]
    seen[f"asked for {points}"] = [len(logs), max(row["loss"] for row in logs)]
Path("seen.json").write_text(json.dumps(seen))
PY
timeout 120 v/bin/python seen.py > log 2>&1 || { cat log; exit 1; }
cat seen.json; echo
[ "$(cat seen.json)" = '{"stored": [6000, 9.0], "asked for None": [1501, 1.0], "asked for 5999": [3001, 1.0], "asked for 6000": [6000, 9.0]}' ] || { echo "changed"; exit 1; }
echo "as described"
