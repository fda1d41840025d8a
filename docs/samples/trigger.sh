curl -X POST "https://your-instance.com/api/jobs/your-job-id/run" \
  -H "Authorization: Bearer dbm_your_api_key"
