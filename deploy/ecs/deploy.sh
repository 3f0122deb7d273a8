#!/usr/bin/env bash
# Brings an image, by its digest, to an environment on ECS: platform, migration, services. CloudFormation and the circuit
# breaker of ECS go back by themselves where the services do not become healthy.
#
#   deploy/ecs/deploy.sh staging REGISTRY/agent-service@sha256:… my-staging.json
#
# The last one is a copy of parameters.json, filled in.
set -euo pipefail

if [[ $# -ne 3 || ! $1 =~ ^(staging|production)$ || ! -r $3 ]]; then
    echo "usage: deploy.sh staging|production IMAGE@sha256:DIGEST PARAMETERS.json" >&2
    exit 2
fi
environment=$1 image=$2 parameters=$3
if [[ ! $image =~ ^[a-z0-9][a-z0-9.:/_-]*@sha256:[0-9a-f]{64}$ ]]; then
    echo "deploy.sh: $image is not an image by its digest, as in registry.example.com/agent-service@sha256:…" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 - "$parameters" "Environment=$environment" "Image=$image" >"$work/parameters.json" <<'PYTHON'
import json, sys

given = json.load(open(sys.argv[1]))
json.dump([each for each in given if each.partition("=")[0] not in ("Environment", "Image")] + sys.argv[2:], sys.stdout)
PYTHON

stack() {
    echo "== $1"
    aws cloudformation deploy --stack-name "agent-service-$environment-$1" --template-file "$here/$1.yaml" \
        --parameter-overrides "file://$work/parameters.json" --capabilities CAPABILITY_IAM --no-fail-on-empty-changeset
}

output() {
    aws cloudformation describe-stacks --stack-name "agent-service-$environment-platform" --output text \
        --query "Stacks[0].Outputs[?OutputKey=='$1'].OutputValue"
}

stack platform

echo "== migration"
subnets=$(python3 -c 'import json, sys; print(next(v.partition("=")[2] for v in json.load(open(sys.argv[1]))
    if v.startswith("PrivateSubnets=")))' "$work/parameters.json")
cluster=$(output Cluster)
network="awsvpcConfiguration={subnets=[$subnets],securityGroups=[$(output WorkerGroup)],assignPublicIp=DISABLED}"
task=$(aws ecs run-task --cluster "$cluster" --task-definition "$(output MigrateTask)" --launch-type FARGATE \
    --network-configuration "$network" --query 'tasks[0].taskArn' --output text)
aws ecs wait tasks-stopped --cluster "$cluster" --tasks "$task"
code=$(aws ecs describe-tasks --cluster "$cluster" --tasks "$task" \
    --query 'tasks[0].containers[0].exitCode' --output text)
if [[ $code != 0 ]]; then
    echo "deploy.sh: the migration ended with $code, see the logs of /agent-service/$environment; what runs was not touched" >&2
    exit 1
fi

stack services
echo "== $environment runs $image"
