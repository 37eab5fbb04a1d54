# SPDX-License-Identifier: LGPL-2.1-or-later
# shellcheck shell=bash
#
# Completion for bash(1), made of what each command says of itself: the options of `COMMAND --help`, the steps of
# vnb-checkpoint, the domains of libvirt, and files. Source it, or put it where bash-completion looks.

_vnb() {
    local word=$2 help words=
    # As it is typed: a command that is not in PATH, or another version of it, speaks for itself.
    help=$("$1" --help 2> /dev/null < /dev/null) || return
    case $word,${1##*/},$COMP_CWORD in
        -*)
            words=$(sed -n '/^Options:/,$ s/^  \(-.*\)/\1/p' <<< "$help" | sed 's/  .*//' |
                grep -oE -- '(^|[ ,])--?[[:alpha:]][[:alnum:]-]*' | tr -d ' ,') ;;
        *,vnb-checkpoint,1)
            words=$(sed -n '/^Usage:/,/^$/ s/^  vnb-[a-z]* (*\([a-z][a-z| ]*\).*/\1/p' <<< "$help" | tr '| ' '\n' | sort -u) ;;
        *,vnb-checkpoint,* | *,vnb-backup,*)
            words=$(virsh --readonly list --all --name 2> /dev/null < /dev/null) ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}

complete -o default -F _vnb vnb-apply vnb-backup vnb-backup-all vnb-cat vnb-checkpoint vnb-config vnb-dump vnb-extents \
    vnb-import vnb-map vnb-options vnb-pack vnb-prune vnb-read vnb-restore vnb-verify
