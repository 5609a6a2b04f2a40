package volume

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/options"
)

func TestAnonymousNames(t *testing.T) {
	digits := strings.Repeat("0123456789abcdef", 4)
	assert.Assert(t, Anonymous(digits))
	for _, name := range []string{"", "web", digits[1:], digits + "0", strings.ToUpper(digits), digits[:63] + "g"} {
		assert.Assert(t, !Anonymous(name), name)
	}
}

func TestDefaultsOfARecord(t *testing.T) {
	purge := options.Purge
	anonymous := strings.Repeat("f", 64)
	for _, tc := range []struct {
		name    string
		adopted bool
		asked   *options.OnRemove
		want    options.OnRemove
	}{
		{"web", false, nil, options.Trash},
		{"web", true, nil, options.Keep},
		{"web", true, &purge, options.Purge},
		{anonymous, false, nil, options.Purge},
		{anonymous, true, nil, options.Keep},
	} {
		rec := newRecord(tc.name, "host", options.Spec{OnRemove: tc.asked}, tc.adopted, time.Now())
		rec.Engine = "dir"
		assert.Equal(t, rec.OnRemove, tc.want)
		data, err := rec.Encode()
		assert.NilError(t, err)
		back, err := DecodeRecord(tc.name, data)
		assert.NilError(t, err)
		assert.DeepEqual(t, back, rec)
	}
}

func TestRecordsThatAreRefused(t *testing.T) {
	rec := newRecord("web", "host", options.Spec{}, false, time.Now())
	rec.Engine = "dir"
	good, err := rec.Encode()
	assert.NilError(t, err)
	for _, tc := range []struct {
		change string
		want   error
	}{
		{`{"schema":3}`, ErrNewer},
		{`{"schema":99,"uuid":7}`, ErrNewer},
		{`{"schema":0}`, ErrDamaged},
		{`{"uuid":"../../etc"}`, ErrDamaged},
		{`{"uuid":"{11111111-1111-4111-8111-111111111111}"}`, ErrDamaged},
		{`{"uuid":""}`, ErrDamaged},
		{`{"name":"db"}`, ErrDamaged},
		{`{"name":"../web"}`, ErrDamaged},
		{`{"engine":""}`, ErrDamaged},
		{`{"phase":"gone"}`, ErrDamaged},
		{`{"host":""}`, ErrDamaged},
		{`{"on-remove":"burn"}`, ErrDamaged},
		{`{"created":"0001-01-01T00:00:00Z"}`, ErrDamaged},
		{`{"created":"yesterday"}`, ErrDamaged},
		{`{"options":[]}`, ErrDamaged},
	} {
		var fields map[string]any
		assert.NilError(t, json.Unmarshal(good, &fields))
		assert.NilError(t, json.Unmarshal([]byte(tc.change), &fields))
		data, err := json.Marshal(fields)
		assert.NilError(t, err)
		_, err = DecodeRecord("web", data)
		assert.ErrorIs(t, err, tc.want, tc.change)
	}
	for _, data := range []string{"", "{", "null", "[]", "7", string(good[:len(good)/2]), "\x00\x00"} {
		_, err := DecodeRecord("web", []byte(data))
		assert.ErrorIs(t, err, ErrDamaged, "%q", data)
	}
	// Fields of a later version that changes nothing for this one.
	_, err = DecodeRecord("web", []byte(strings.Replace(string(good), "{", `{"new":{"a":1},`, 1)))
	assert.NilError(t, err)
}

func FuzzCheckName(f *testing.F) {
	for _, seed := range []string{"web", "a b", "../x", "", ".", "..", ".berth", "a/b", "né", strings.Repeat("n", 201), "a\x00", "web@snap", "web\n"} {
		f.Add(seed)
	}
	allowed := regexp.MustCompile(`\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,199}\z`)
	f.Fuzz(func(t *testing.T, name string) {
		err := CheckName(name)
		assert.Equal(t, err == nil, allowed.MatchString(name), "%q: %v", name, err)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err))
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\x00"), "%q", err)
			return
		}
		assert.Equal(t, filepath.Join("/root", name), "/root/"+name)
		assert.Assert(t, name != metaName && name != AcceptName)
	})
}

func FuzzDecodeRecord(f *testing.F) {
	rec := newRecord("web", "host", options.Spec{Given: map[string]string{"uid": "1"}}, true, time.Unix(1e9, 0))
	rec.Engine = "dir"
	good, err := rec.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add([]byte(`{"schema":3}`))
	f.Add([]byte(`{"schema":1,"name":"web","uuid":"x"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := DecodeRecord("web", data)
		if err != nil {
			assert.Assert(t, errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewer), "%v", err)
			return
		}
		assert.Equal(t, rec.Name, "web")
		assert.Equal(t, filepath.Join("/trash", rec.UUID), "/trash/"+rec.UUID)
		again, err := rec.Encode()
		assert.NilError(t, err)
		back, err := DecodeRecord("web", again)
		assert.NilError(t, err)
		assert.Equal(t, back.UUID, rec.UUID)
		assert.Assert(t, back.CreatedAt.Equal(rec.CreatedAt))
	})
}

// What a snapshot is called must not be what its neighbours' files are called.
func TestSnapshotNamesThatWouldMeetOtherFiles(t *testing.T) {
	for _, name := range []string{"a.json", "a.making", "a.img", ".json", "a/b", "", strings.Repeat("n", 101)} {
		assert.Assert(t, errdefs.IsInvalidArgument(CheckSnapshotName(name)), name)
	}
	for _, name := range []string{"a", "json", "a.json.1", "20260501T150000Z", strings.Repeat("n", 100)} {
		assert.NilError(t, CheckSnapshotName(name))
	}
}
