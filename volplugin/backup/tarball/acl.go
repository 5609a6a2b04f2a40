package tarball

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Tags of the entries of a POSIX ACL, as linux/posix_acl.h has them, and what they are
// called in words.
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

var aclWords = map[uint16]string{
	aclUserObj: "user", aclUser: "user", aclGroupObj: "group", aclGroup: "group", aclMask: "mask", aclOther: "other",
}

const (
	aclVersion = 2
	aclHeader  = 4 // bytes
	aclEntry   = 8
	// aclNobody is the ID in entries that have none.
	aclNobody = ^uint32(0)
)

// aclText gives the words for an ACL as an extended attribute holds it: entries such
// as "user::rwx" and "group:1000:r-x", with commas between.
func aclText(value []byte) (string, error) {
	if len(value) < aclHeader || (len(value)-aclHeader)%aclEntry != 0 || binary.LittleEndian.Uint32(value) != aclVersion {
		return "", fmt.Errorf("an ACL of %d bytes has an unknown form", len(value))
	}
	var words []string
	for entry := value[aclHeader:]; len(entry) > 0; entry = entry[aclEntry:] {
		tag, perm, id := binary.LittleEndian.Uint16(entry), binary.LittleEndian.Uint16(entry[2:]), binary.LittleEndian.Uint32(entry[4:])
		word, ok := aclWords[tag]
		if !ok || perm > 7 {
			return "", fmt.Errorf("an ACL has an entry of tag %d with permissions %d", tag, perm)
		}
		who := ""
		if tag == aclUser || tag == aclGroup {
			who = strconv.FormatUint(uint64(id), 10)
		}
		bits := []byte("rwx")
		for i := range bits {
			if perm&(4>>i) == 0 {
				bits[i] = '-'
			}
		}
		words = append(words, word+":"+who+":"+string(bits))
	}
	return strings.Join(words, ","), nil
}

// errNamed is the error for a user or group that has a name and no number. Who that is
// here nobody knows.
var errNamed = errors.New("want the number of a user or group")

// parseACL reads what aclText gives, and what GNU tar, star and bsdtar write: with line
// ends for commas, words cut down to one letter, comments after #, and the number of a user in a
// fourth field. A user who has a name only is errNamed.
func parseACL(text string) ([]byte, error) {
	value := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for entry := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		entry, _, _ = strings.Cut(entry, "#")
		entry = strings.TrimSpace(entry)
		if entry == "" {
			continue
		}
		tag, perm, id, err := parseACLEntry(entry)
		if err != nil {
			return nil, fmt.Errorf("entry %.80q of an ACL: %w", entry, err)
		}
		value = binary.LittleEndian.AppendUint16(value, tag)
		value = binary.LittleEndian.AppendUint16(value, perm)
		value = binary.LittleEndian.AppendUint32(value, id)
	}
	return value, nil
}

func parseACLEntry(entry string) (tag, perm uint16, id uint32, err error) {
	fields := strings.Split(entry, ":")
	if len(fields) < 3 || len(fields) > 4 {
		return 0, 0, 0, fmt.Errorf("want KIND:WHO:PERMISSIONS")
	}
	who := fields[1]
	if who != "" && len(fields) == 4 {
		who = fields[3]
	}
	switch {
	case isWord(fields[0], "user"):
		tag = aclUserObj
	case isWord(fields[0], "group"):
		tag = aclGroupObj
	case isWord(fields[0], "mask"):
		tag = aclMask
	case isWord(fields[0], "other"):
		tag = aclOther
	default:
		return 0, 0, 0, fmt.Errorf("kind %q: want user, group, mask or other", fields[0])
	}
	id = aclNobody
	if who != "" {
		number, err := strconv.ParseUint(who, 10, 32)
		if tag == aclMask || tag == aclOther {
			return 0, 0, 0, fmt.Errorf("%s is for nobody in particular", fields[0])
		}
		if err != nil {
			return 0, 0, 0, errNamed
		}
		// The tags of those who have a number follow on the others'.
		tag, id = tag<<1, uint32(number)
	}
	for _, bit := range fields[2] {
		switch bit {
		case 'r':
			perm |= 4
		case 'w':
			perm |= 2
		case 'x':
			perm |= 1
		case '-':
		default:
			return 0, 0, 0, fmt.Errorf("permissions %q: want some of rwx", fields[2])
		}
	}
	return tag, perm, id, nil
}

func isWord(given, word string) bool { return given == word || given == word[:1] }
