#!/usr/bin/env python3
import json
import sys
import urllib.error
import urllib.request

API_KEY = "dbm_your_api_key"
BASE_URL = "https://your-instance.com"
JOB_ID = "your-job-id"


def call(method, path):
    request = urllib.request.Request(BASE_URL + path, method=method, headers={"Authorization": f"Bearer {API_KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=90) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{method} {path}: {error.code} {error.read().decode()}")
    except urllib.error.URLError as error:
        sys.exit(f"{method} {path}: {error.reason}")


execution_id = call("POST", f"/api/jobs/{JOB_ID}/run")["executionId"]
print("Execution started:", execution_id)

while True:
    # Answered when the run ends, or after 30 seconds.
    run = call("GET", f"/api/executions/{execution_id}?wait=30")["data"]
    print(f"Status: {run['status']} | Progress: {run['progress']} | Stage: {run['stage']}")
    if run["status"] == "Success":
        break
    if run["status"] == "Failed":
        sys.exit(f"Backup failed: {run['error']}")
