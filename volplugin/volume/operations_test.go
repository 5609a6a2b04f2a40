package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/options"
)

// operations are what is killed. after is what the root shows when one has ended.
func operations() map[string]operation {
	base := func(web string, more ...string) []string {
		lines := append([]string{"volume bystander ready mine", "snapshot web@old ready v1"}, more...)
		if web != "" {
			lines = append(lines, web)
		}
		slices.Sort(lines)
		return lines
	}
	const web = "volume web ready v2"
	from := func(value string, o options.Spec) func(context.Context, *Root) error {
		return func(ctx context.Context, r *Root) error {
			ref, err := ParseReference(value)
			if err != nil {
				return err
			}
			o.From = &options.Source{Volume: ref.Volume, Snapshot: ref.Snapshot}
			_, err = r.Create(ctx, "new", o)
			return err
		}
	}
	mode := uint32(0o711)
	remove := func(policy options.OnRemove) operation {
		op := operation{
			set: func(s *scene, r *Root) {
				_, err := r.Update(s.t.Context(), "web", func(rec *Record) error {
					rec.OnRemove = policy
					return nil
				})
				assert.NilError(s.t, err)
			},
			do: func(ctx context.Context, r *Root) error { return r.Remove(ctx, "web") },
		}
		switch policy {
		case options.Keep:
			op.after = []string{"loose web v2", "snapshot kept:web@old ready v1", "volume bystander ready mine"}
		default:
			op.after = []string{"snapshot trash:web@old ready v1", "trash web v2", "volume bystander ready mine"}
		}
		return op
	}
	inTrash := func(s *scene, r *Root) { assert.NilError(s.t, r.Remove(s.t.Context(), "web")) }
	clone := base(web, "volume new ready v2")
	outside := func(s *scene, _ *Root) {
		s.t.Helper()
		assert.NilError(s.t, os.Mkdir(s.path("src"), 0o755))
		s.write("src/page", "src")
	}
	adopt := func(copied bool) func(context.Context, *Root) error {
		return func(ctx context.Context, r *Root) error {
			_, err := r.Adopt(ctx, "new", filepath.Join(r.Path, "src"), copied, options.Spec{Mode: &mode}, nil)
			return err
		}
	}
	return map[string]operation{
		"create": {after: base(web, "volume new ready -"), do: func(ctx context.Context, r *Root) error {
			_, err := r.Create(ctx, "new", options.Spec{Mode: &mode})
			return err
		}},
		"clone":          {after: clone, do: from("web", options.Spec{})},
		"clone snapshot": {after: base(web, "volume new ready v1"), do: from("web@old", options.Spec{Mode: &mode})},
		"copy":           {after: clone, do: from("web", options.Spec{Engine: "other"})},
		"copy moment": {
			set: func(s *scene, r *Root) {
				_, err := r.Create(s.t.Context(), "inst", options.Spec{Engine: "other"})
				assert.NilError(s.t, err)
				s.write("inst/page", "i")
			},
			after: base(web, "volume inst ready i", "volume new ready i"),
			do:    from("inst", options.Spec{Engine: "dir"}),
		},
		"seed": {set: outside, after: base(web, "loose src src", "volume new ready src"), do: func(ctx context.Context, r *Root) error {
			_, err := r.Create(ctx, "new", options.Spec{Seed: "src"})
			return err
		}},
		"adopt move": {set: outside, after: base(web, "volume new ready src"), do: adopt(false)},
		"adopt copy": {set: outside, after: base(web, "loose src src", "volume new ready src"), do: adopt(true)},
		"snapshot": {after: base(web, "snapshot web@s1 ready v2"), do: func(ctx context.Context, r *Root) error {
			_, err := r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "s1"}, nil)
			return err
		}},
		"remove snapshot": {after: []string{"volume bystander ready mine", web}, do: func(ctx context.Context, r *Root) error {
			err := r.RemoveSnapshot(ctx, "web", "old")
			if errors.Is(err, ErrNoSnapshot) {
				return nil
			}
			return err
		}},
		"rollback": {after: base("volume web ready v1", "snapshot web@pre-rollback-TIME ready v2"), do: func(ctx context.Context, r *Root) error {
			_, err := r.Rollback(ctx, "web", "old", nil)
			return err
		}},
		"rename": {after: []string{"snapshot site@old ready v1", "volume bystander ready mine", "volume site ready v2"}, do: func(ctx context.Context, r *Root) error {
			_, err := r.Rename(ctx, "web", "site")
			return err
		}},
		"remove":       remove(options.Trash),
		"remove keep":  remove(options.Keep),
		"remove purge": remove(options.Purge),
		"adopt kept": {
			set: func(s *scene, r *Root) {
				remove(options.Keep).set(s, r)
				inTrash(s, r)
			},
			after: base(web),
			do: func(ctx context.Context, r *Root) error {
				_, err := r.Create(ctx, "web", options.Spec{Engine: "dir"})
				return err
			},
		},
		"restore": {set: inTrash, after: base(web), do: func(ctx context.Context, r *Root) error {
			_, err := r.RestoreTrash(ctx, "web", "")
			return err
		}},
		"restore elsewhere": {set: inTrash, after: []string{"snapshot site@old ready v1", "volume bystander ready mine", "volume site ready v2"}, do: func(ctx context.Context, r *Root) error {
			_, err := r.RestoreTrash(ctx, "web", "site")
			return err
		}},
		"purge": {set: inTrash, after: []string{"volume bystander ready mine"}, do: func(ctx context.Context, r *Root) error {
			_, err := r.PurgeTrash(ctx, "web")
			return err
		}},
		"update": {after: base(web), do: func(ctx context.Context, r *Root) error {
			_, err := r.Update(ctx, "web", func(rec *Record) error {
				rec.Labels = map[string]string{"a": "b"}
				return nil
			})
			return err
		}},
		"recover": {do: recoverRoot},
	}
}

type operation struct {
	set   func(*scene, *Root)
	do    func(context.Context, *Root) error
	after []string
}

func sortedOperations() []string {
	var names []string
	for name := range operations() {
		if name != "recover" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
