package journal

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"hash/crc32"
)

const (
	magic   = "BERTHLOG"
	version = 1

	headerSize = 64  // bytes, of which the last four are the checksum
	headerCopy = 512 // where the second header lies
	firstFrame = 1024

	frameHead = 24 // bytes before the records of a frame
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is what the start of a file says.
type header struct {
	version  uint32
	salt     uint64
	snapshot int64 // where the frames of the snapshot end
}

// newHeader has a salt that no other file has.
func newHeader() header {
	h := header{version: version, snapshot: firstFrame}
	for h.tag() == 0 { // zeros are no frame
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		h.salt = binary.LittleEndian.Uint64(b[:])
	}
	return h
}

// tag marks the frames of the file.
func (h header) tag() uint32 { return uint32(h.salt) }

// encode returns the first bytes of a file, up to the first frame.
func (h header) encode() []byte {
	out := make([]byte, firstFrame)
	copy(out, magic)
	binary.LittleEndian.PutUint32(out[8:], h.version)
	binary.LittleEndian.PutUint64(out[16:], h.salt)
	binary.LittleEndian.PutUint64(out[24:], uint64(h.snapshot))
	binary.LittleEndian.PutUint32(out[headerSize-4:], crc32.Checksum(out[:headerSize-4], castagnoli))
	copy(out[headerCopy:], out[:headerSize])
	return out
}

// parseHeader reads the header that starts at offset.
func parseHeader(data []byte, offset int) (h header, ok bool) {
	if len(data) < offset+headerSize {
		return header{}, false
	}
	b := data[offset : offset+headerSize]
	if string(b[:8]) != magic || binary.LittleEndian.Uint32(b[headerSize-4:]) != crc32.Checksum(b[:headerSize-4], castagnoli) {
		return header{}, false
	}
	return header{
		version:  binary.LittleEndian.Uint32(b[8:]),
		salt:     binary.LittleEndian.Uint64(b[16:]),
		snapshot: int64(binary.LittleEndian.Uint64(b[24:])),
	}, true
}

// newFrame returns a frame without records, to be filled by add.
func newFrame(buf []byte) []byte {
	return append(buf[:0], make([]byte, frameHead)...)
}

// add puts a record into a frame.
func add(frame, record []byte) []byte {
	frame = binary.AppendUvarint(frame, uint64(len(record)))
	return append(frame, record...)
}

// seal fills the head of a frame for its place in a file: the offset, and the
// number of records before it. A frame may be sealed again for another file.
func (h header) seal(frame []byte, offset int64, before uint64, count int) {
	binary.LittleEndian.PutUint32(frame, h.tag())
	binary.LittleEndian.PutUint32(frame[8:], uint32(len(frame)-frameHead))
	binary.LittleEndian.PutUint32(frame[12:], uint32(count))
	binary.LittleEndian.PutUint64(frame[16:], before)
	binary.LittleEndian.PutUint32(frame[4:], h.checksum(frame, offset))
}

func (h header) checksum(frame []byte, offset int64) uint32 {
	var place [16]byte
	binary.LittleEndian.PutUint64(place[:], h.salt)
	binary.LittleEndian.PutUint64(place[8:], uint64(offset))
	return crc32.Update(crc32.Checksum(place[:], castagnoli), castagnoli, frame[8:])
}

// frame is one that was found in a file.
type frame struct {
	bytes  []byte // head and records
	before uint64 // records before it
	count  int
}

// frameAt returns the valid frame that starts at offset.
func (h header) frameAt(data []byte, offset int64) (f frame, ok bool) {
	b := data[offset:]
	if len(b) < frameHead || binary.LittleEndian.Uint32(b) != h.tag() {
		return frame{}, false
	}
	length := int64(binary.LittleEndian.Uint32(b[8:]))
	if length > int64(len(b)-frameHead) {
		return frame{}, false
	}
	b = b[:frameHead+length]
	if binary.LittleEndian.Uint32(b[4:]) != h.checksum(b, offset) {
		return frame{}, false
	}
	f = frame{bytes: b, before: binary.LittleEndian.Uint64(b[16:]), count: int(binary.LittleEndian.Uint32(b[12:]))}
	// What the checksum vouches for was written by this package; that the records
	// are those announced is looked at all the same.
	found := 0
	ok = f.each(func([]byte) error { found++; return nil }) == nil
	return f, ok && found > 0 && found == f.count
}

// each calls fn for the records of a frame. Without an error of fn, an error
// says that the frame does not hold what it should.
func (f frame) each(fn func([]byte) error) error {
	for b := f.bytes[frameHead:]; len(b) > 0; {
		length, n := binary.Uvarint(b)
		if n <= 0 || length > uint64(len(b)-n) {
			return errRecord
		}
		b = b[n:]
		if err := fn(b[:length:length]); err != nil {
			return err
		}
		b = b[length:]
	}
	return nil
}

// scan is what is in the bytes of a file.
type scan struct {
	header  header
	frames  []frame
	end     int64 // behind the last frame of the valid start
	records uint64
	damage  Damage
	dropped int64  // bytes behind end that are not zeros at the end of the file
	intact  uint64 // records in valid frames behind the damage
	highest uint64 // records that the file held at least, damaged ones included
}

// scanFile reads a whole file. It never fails: what cannot be read is damage.
func scanFile(data []byte) scan {
	first, ok1 := parseHeader(data, 0)
	second, ok2 := parseHeader(data, headerCopy)
	s := scan{header: first}
	switch {
	case !ok1 && !ok2, len(data) < firstFrame && (ok1 || ok2):
		return scan{header: first, damage: Unreadable, dropped: int64(len(data))}
	case !ok1:
		s.header, s.damage = second, HeaderCopy
	case !ok2, first != second:
		s.damage = HeaderCopy
	}
	if s.header.version != version {
		return s
	}
	s.end = firstFrame
	for {
		f, ok := s.header.frameAt(data, s.end)
		if !ok || f.before != s.records {
			break
		}
		s.frames = append(s.frames, f)
		s.end += int64(len(f.bytes))
		s.records += uint64(f.count)
	}
	s.scanRest(data)
	return s
}

// scanRest tells what the bytes behind the valid start are.
func (s *scan) scanRest(data []byte) {
	s.highest = s.records
	rest := data[s.end:]
	used := len(bytes.TrimRight(rest, "\x00"))
	s.dropped = int64(used)
	if len(rest)-used < frameHead {
		s.damage = Cut
	} else if used > 0 {
		s.damage = Torn
	}
	tag := binary.LittleEndian.AppendUint32(nil, s.header.tag())
	for at := s.end; used > 0; {
		skip := bytes.Index(data[at:], tag)
		if skip < 0 {
			return
		}
		at += int64(skip)
		f, ok := s.header.frameAt(data, at)
		if !ok || f.before < s.highest {
			at++
			continue
		}
		s.damage = Middle
		s.intact += uint64(f.count)
		s.highest = f.before + uint64(f.count)
		at += int64(len(f.bytes))
	}
}
