# SPDX-License-Identifier: LGPL-2.1-or-later
# shellcheck shell=bash
#
# Completion for bash(1), made of what each command says of itself: the options of `COMMAND --help`, the steps of
# vnb-checkpoint, the domains of libvirt, and files. Source it, or put it where bash-completion looks.

_vnb() {
    local word=$2 name=${1##*/} help options before value='' count=0 words=''
    # As it is typed: a command that is not in PATH, or another version of it, speaks for itself.
    help=$("$1" --help 2> /dev/null < /dev/null) || return
    [[ $name != vnb-backup-all ]] || help+=$'\n'$("${1%-all}" --help 2> /dev/null < /dev/null)  # it takes these, too
    # A line each, with the first letter of its value behind an option that takes one.
    options=$(sed -n '/^Options:/,$ s/^  \(-.*\)/\1/p' <<< "$help" | sed 's/  .*//' |
        grep -oE -- '(^|[ ,])--?[[:alpha:]][[:alnum:]-]*( [A-Z])?' | sed 's/^[ ,]*//' | sort -u)
    # What stands before: a value that is to come, or so many operands. A = is a word of its own.
    for before in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $before == = ]]; then value=yes
        elif [[ $value ]]; then value=''
        elif [[ $before == -- ]]; then count=9
        elif [[ $before != -* ]]; then ((++count))
        elif grep -q -- "^$before [A-Z]" <<< "$options"; then value=yes
        fi
    done
    case ${value:-$word},$name,$count in
        yes,*) ;;  # files
        -*,*) words=$(cut -d ' ' -f 1 <<< "$options") ;;
        *,vnb-checkpoint,0)
            words=$(sed -n '/^Usage:/,/^$/ s/^  vnb-[a-z]* (*\([a-z][a-z| ]*\).*/\1/p' <<< "$help" | tr '| ' '\n' | sort -u) ;;
        *,vnb-checkpoint,1 | *,vnb-backup,0)
            words=$(virsh --readonly list --all --name 2> /dev/null < /dev/null) ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}

complete -o default -F _vnb vnb-apply vnb-backup vnb-backup-all vnb-cat vnb-checkpoint vnb-config vnb-dump vnb-extents \
    vnb-import vnb-map vnb-options vnb-pack vnb-prune vnb-read vnb-restore vnb-verify
