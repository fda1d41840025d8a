#!/bin/bash
set -euo pipefail

API_KEY="dbm_your_api_key"
BASE_URL="https://your-instance.com"
JOB_ID="your-job-id"

# Trigger the backup
echo "Starting backup job..."
RESPONSE=$(curl -s -X POST "${BASE_URL}/api/jobs/${JOB_ID}/run" \
  -H "Authorization: Bearer ${API_KEY}")

EXECUTION_ID=$(echo "${RESPONSE}" | jq -r '.executionId')
if [ "${EXECUTION_ID}" = "null" ] || [ -z "${EXECUTION_ID}" ]; then
  echo "Failed to start job: ${RESPONSE}"
  exit 1
fi

echo "Execution started: ${EXECUTION_ID}"

# Poll until completion
while true; do
  STATUS_RESPONSE=$(curl -s "${BASE_URL}/api/executions/${EXECUTION_ID}" \
    -H "Authorization: Bearer ${API_KEY}")

  STATUS=$(echo "${STATUS_RESPONSE}" | jq -r '.data.status')
  PROGRESS=$(echo "${STATUS_RESPONSE}" | jq -r '.data.progress // "N/A"')
  STAGE=$(echo "${STATUS_RESPONSE}" | jq -r '.data.stage // "N/A"')

  echo "Status: ${STATUS} | Progress: ${PROGRESS} | Stage: ${STAGE}"

  case "${STATUS}" in
    "Success")
      echo "Backup completed successfully!"
      exit 0
      ;;
    "Failed")
      ERROR=$(echo "${STATUS_RESPONSE}" | jq -r '.data.error // "Unknown error"')
      echo "Backup failed: ${ERROR}"
      exit 1
      ;;
    "Pending"|"Running")
      sleep 5
      ;;
    *)
      echo "Unknown status: ${STATUS}"
      exit 1
      ;;
  esac
done
