#!/usr/bin/env bash
set -euo pipefail

export DBACKUP_URL="https://your-instance.com"
export DBACKUP_API_KEY="dbm_your_api_key"

dbackup trigger your-job-id
