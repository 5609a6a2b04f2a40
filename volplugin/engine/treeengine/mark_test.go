package treeengine

import (
	"encoding/json"
	"testing"
)

func FuzzMark(f *testing.F) {
	whole, err := json.Marshal(mark{Tree: "1:00ff"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)-1])
	f.Add([]byte(`{"Tree":""}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var m mark
		if !m.decode(data) {
			return
		}
		again, err := json.Marshal(m)
		var same mark
		if err != nil || !same.decode(again) || same != m {
			t.Fatalf("%+v became %+v (%v)", m, same, err)
		}
	})
}
