#!/usr/bin/env bash
# Makes the Secrets that the manifests name, with random values, in the namespace rtdmd: once, before the first start.
# No value is shown, and none is an argument of a program, which everybody on this machine could read.
set -euo pipefail
umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

random() { openssl rand -hex 32 | tr -d '\n' > "$folder/$1"; }
hash_of() { sha256sum "$folder/$1" | cut -d ' ' -f 1; }

random token
random ray-password
random rewards-password
# ray: Ray's head, which keeps its state there, and the driver. rewards: reward servers, which register, and nothing else.
cat > "$folder/users.acl" << USERS
user default off
user ray on #$(hash_of ray-password) ~RAY* ~DUMMY ~rtdmd:* -@all +@read +@write +@connection +@transaction -@dangerous +info +cluster|info
user rewards on #$(hash_of rewards-password) ~rtdmd:servers:* ~rtdmd:lease:* -@all +@read +@write +@connection +@transaction -@dangerous
USERS

kubectl --namespace rtdmd create secret generic rtdmd-reward-token --from-file="$folder/token"
kubectl --namespace rtdmd create secret generic rtdmd-redis --from-file="$folder/users.acl" \
    --from-file="$folder/ray-password" --from-file="$folder/rewards-password"
