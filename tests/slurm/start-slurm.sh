#!/bin/bash
# Bring up a throw-away Slurm cluster on one host, loopback only, no systemd,
# no slurmdbd.  Files only in $SLURM_TEST_ROOT (packages and cgroup directories aside).
# Idempotent: a healthy cluster is left alone.  Afterwards: . $SLURM_TEST_ROOT/env.sh
#
#   SLURM_TEST_ROOT   state, logs, keys       (/tmp/slurm-test)
#   SLURM_TEST_NODES  virtual nodes           (2)
#   SLURM_TEST_PREFIX their names: n1 n2 ..   (n; two clusters at once need different ones)
#   SLURM_TEST_CPUS   CPUs each one claims    (4; may exceed the real count)
#   SLURM_TEST_MEM    MB of memory each claims (1000000; nothing enforces it)
#   SLURM_TEST_GPUS   pretend GPUs each       (0; sets CUDA_VISIBLE_DEVICES only)
#   SLURM_TEST_PORT   first port              (16817: slurmctld; slurmd from +1)
#   SLURM_TEST_PROCTRACK  cgroup | linuxproc | pgid (cgroup where root can write a v1 freezer
#                     hierarchy, else linuxproc).  Only cgroup catches everything a job starts.
#   SLURM_TEST_NS     1: each slurmd in its own UTS+mount namespace, so a job's
#                     hostname is n1, n2 .. and those names resolve (root only; default where it works)
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
ROOT=${SLURM_TEST_ROOT:-/tmp/slurm-test}
NODES=${SLURM_TEST_NODES:-2} PRE=${SLURM_TEST_PREFIX:-n} CPUS=${SLURM_TEST_CPUS:-4} GPUS=${SLURM_TEST_GPUS:-0}
MEM=${SLURM_TEST_MEM:-1000000} PORT=${SLURM_TEST_PORT:-16817}
FREEZER=/sys/fs/cgroup/freezer
PROCTRACK=${SLURM_TEST_PROCTRACK:-$([ "$(id -u)" = 0 ] && [ -e $FREEZER/tasks ] && [ -w $FREEZER/tasks ] && echo cgroup || echo linuxproc)}
NS=${SLURM_TEST_NS:-$([ "$(id -u)" = 0 ] && unshare --uts --mount true 2>/dev/null && echo 1 || echo 0)}
here=$(cd "$(dirname "$0")" && pwd)
say() { echo "start-slurm: $*" >&2; }
die() { say "$*"; for l in "$ROOT"/log/*; do [ -s "$l" ] && { say "-- $l"; tail -n 8 "$l" >&2; }; done
  [ -z "${launched:-}" ] || SLURM_TEST_ROOT=$ROOT "$here/stop-slurm.sh" 9>&-; exit 1; }

unable() { say "$*"; exit 77; }   # nothing is wrong, but it cannot run here

mkdir -p "$ROOT"; exec 9>"$ROOT/lock"; flock 9   # test workers may all ask at once

# ---- packages (root only; ~10 s the first time) -----------------------------
if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null \
   || ! command -v sbatch >/dev/null || ! command -v munged >/dev/null; then
  [ "$(id -u)" = 0 ] || unable "need slurmctld slurmd slurm-client munge (apt-get, as root)"
  undo=
  if [ ! -e /usr/sbin/policy-rc.d ]; then   # keep the packages' own services from starting
    undo=1; printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d
  fi
  install() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends \
              slurmctld slurmd slurm-client munge >"$ROOT/apt.log" 2>&1; }
  install || { apt-get update >/dev/null 2>&1 && install; } || { [ -z "$undo" ] || rm -f /usr/sbin/policy-rc.d; unable "apt-get failed: $(tail -n 3 "$ROOT/apt.log")"; }
  [ -z "$undo" ] || rm -f /usr/sbin/policy-rc.d
fi

# ---- already up? ------------------------------------------------------------
alive() { local p s n; while read -r p s n; do   # every recorded pid, same start time, no zombie
    [ "$(awk '$3!="Z"{print $22}' "/proc/$p/stat" 2>/dev/null)" = "$s" ] || return 1; done <"$ROOT/pids"; }
ready() { [ "$(SLURM_CONF=$ROOT/slurm.conf timeout 5 sinfo -h -N -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated|completing)$')" = "$NODES" ]; }
if [ -s "$ROOT/pids" ]; then
  if alive && ready; then say "already up ($ROOT)"; echo ". $ROOT/env.sh"; exit 0; fi
  SLURM_TEST_ROOT=$ROOT "$here/stop-slurm.sh" 9>&-
fi

if [ "$PROCTRACK" = cgroup ]; then for i in $(seq "$NODES"); do   # job ids would collide in there
  [ ! -e "$FREEZER/slurm_$PRE$i" ] || die "$FREEZER/slurm_$PRE$i exists: another cluster has these node names (SLURM_TEST_PREFIX), or one died (then rmdir it)"
done; fi

# ---- files ------------------------------------------------------------------
me=$(id -un) host=$(hostname -s)
rm -rf "$ROOT/state" "$ROOT/spool" "$ROOT/munge" "$ROOT/log" "$ROOT"/{slurm,gres,cgroup}.conf
mkdir -p "$ROOT"/{state,log,munge} ; chmod 755 "$ROOT" "$ROOT/munge"
: >"$ROOT/pids"
(umask 077; head -c 128 /dev/urandom >"$ROOT/munge/key")
# One address for everything, one port per node: a connection to 127.0.1.2 leaves with source
# 127.0.0.1, slurmd calls srun back there, and srun would not be listening (NoInAddrAny).
if [ "$NS" = 1 ]; then ctlname=slurmctl0; else ctlname=$host; fi
[ "$(getent ahostsv4 "$host" | awk 'NR==1{print $1}')" = 127.0.0.1 ] ||
  unable "'$host' must resolve to 127.0.0.1 (/etc/hosts): Slurm binds to what the host's name means"

{ cat <<CONF
ClusterName=testcluster
SlurmctldHost=$ctlname(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$me
SlurmdUser=$me
# loopback only: bind to what the hostname resolves to, never to 0.0.0.0
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$ROOT/munge/socket
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/state/slurmctld.pid
SlurmdPidFile=$ROOT/spool/%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
# no slurmdbd; finished jobs go to a text file and stay in squeue/scontrol for MinJobAge
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/jobcomp.txt
MinJobAge=600
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
# let a node claim more CPUs than the host has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
JobRequeue=1
# refuse at once what can never run, instead of leaving it pending
EnforcePartLimits=ALL
KillWait=5
# quick tests
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
DependencyParameters=kill_invalid_depend
CONF
  if [ "$GPUS" -gt 0 ]; then echo GresTypes=gpu; fi
  for i in $(seq "$NODES"); do
    if [ "$NS" = 1 ]; then h=$PRE$i; else h=$host; fi
    g=; if [ "$GPUS" -gt 0 ]; then g=" Gres=gpu:$GPUS"; fi
    echo "NodeName=$PRE$i NodeHostname=$h NodeAddr=127.0.0.1 Port=$((PORT+i)) CPUs=$CPUS RealMemory=$MEM$g State=UNKNOWN"
  done
  echo "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=00:10:00 OverSubscribe=NO State=UP"
} >"$ROOT/slurm.conf"
if [ "$GPUS" -gt 0 ]; then   # character devices that always exist stand in for the GPUs
  echo "NodeName=${PRE}[1-$NODES] Name=gpu File=/dev/tty[1-$GPUS]" >"$ROOT/gres.conf"
fi
if [ "$PROCTRACK" = cgroup ]; then
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\nCgroupAutomount=no\n' "${FREEZER%/freezer}" >"$ROOT/cgroup.conf"
fi
{ cat /etc/hosts; for n in slurmctl0 $(seq -f "$PRE%g" "$NODES"); do echo "127.0.0.1 $n"; done; } >"$ROOT/hosts"
cat >"$ROOT/env.sh" <<ENV
export SLURM_CONF=$ROOT/slurm.conf
case :\$PATH: in *:/usr/sbin:*) ;; *) PATH=\$PATH:/usr/sbin;; esac
ENV
export SLURM_CONF=$ROOT/slurm.conf

# ---- daemons ----------------------------------------------------------------
# launch NAME HOSTNAME|- CMD..: in the background, own session, pid and start time recorded.
# setsid, unshare and sh all exec, so $! stays the daemon's pid.
launch() { local n=$1 h=$2; shift 2
  if [ "$h" != - ] && [ "$NS" = 1 ]; then
    # shellcheck disable=SC2016
    set -- unshare --uts --mount --propagation private sh -c \
      'mount --bind "$1" /etc/hosts && echo "$2" >/proc/sys/kernel/hostname && shift 2 && exec "$@"' sh "$ROOT/hosts" "$h" "$@"
  fi
  setsid "$@" >"$ROOT/log/$n.out" 2>&1 </dev/null 9>&- &
  echo "$! $(awk '{print $22}' /proc/$!/stat) $n" >>"$ROOT/pids"; }

launched=1
launch munged - munged --foreground --num-threads=2 --socket="$ROOT/munge/socket" \
  --key-file="$ROOT/munge/key" --log-file="$ROOT/munge/log" --pid-file="$ROOT/munge/pid" --seed-file="$ROOT/munge/seed"
for _ in $(seq 50); do [ -S "$ROOT/munge/socket" ] && break; sleep .1; done
[ -S "$ROOT/munge/socket" ] || die "munged did not start"
launch slurmctld slurmctl0 slurmctld -D -f "$SLURM_CONF"
mkdir -p "$ROOT/spool"
for i in $(seq "$NODES"); do mkdir -p "$ROOT/spool/$PRE$i"; launch "slurmd-$PRE$i" "$PRE$i" slurmd -D -f "$SLURM_CONF" -N "$PRE$i"; done

for _ in $(seq 150); do
  alive || die "a daemon has died"
  if ready; then say "up in ${SECONDS}s: $NODES nodes, $ROOT"; echo ". $ROOT/env.sh"; exit 0; fi
  sleep .2
done
die "nodes not ready after 30 s"
