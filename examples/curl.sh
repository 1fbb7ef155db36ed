#!/bin/sh
# sh examples/curl.sh [http://localhost:8000]    what the server does, by curl alone
url=${1:-http://localhost:8000}
say() { printf '\n\n── %s\n' "$*"; }

say "which model"
curl -s "$url/v1/models"

say "one answer"
curl -s "$url/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"messages":[{"role":"user","content":"What is the capital of France?"}],"temperature":0,"max_tokens":32}'

say "the same as a stream, with the usage at its end"
curl -sN "$url/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"messages":[{"role":"user","content":"Count from one to five."}],"max_tokens":16,"stream":true,"stream_options":{"include_usage":true}}'

say "three choices, the same ones every time"
curl -s "$url/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"messages":[{"role":"user","content":"Name a colour."}],"n":3,"seed":7,"temperature":1,"max_tokens":8}'

say "a field that is wrong is named"
curl -s "$url/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"messages":[{"role":"user","content":"Hi"}],"temperature":7}'

say "is it well?"
curl -s "$url/health"
curl -s "$url/healthz"
echo
