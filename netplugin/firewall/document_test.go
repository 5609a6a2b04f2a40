package firewall

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"text/template"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"
)

const documentFile = "../../docs/firewall.md"

// documented are the examples that are shown, in this order.
var documented = []string{
	"nat", "ports", "nat-unprotected", "routed", "routed-ipv6", "internal", "isolated", "icc-off",
	"publish-host-firewall", "publish-sources", "trusted", "snat", "no-masquerade", "uplink",
}

// aboutSets says what the elements of each set are.
var aboutSets = map[setName]string{
	setBridges:      "all Berth bridges",
	setOpen:         "bridges of networks that are not internal",
	setSame:         "each bridge with itself",
	setICC:          "bridges whose containers may talk to each other",
	setRouted:       "bridges with gateway mode `routed`",
	setUnprotected:  "bridges with gateway mode `nat-unprotected`",
	setHost:         "bridges with `publish=host-firewall`",
	setLimited:      "bridges whose published ports are for some sources only",
	setAllowed:      "these sources, by bridge",
	setTrusted:      "trusted links, with the bridge that trusts them",
	setSwitched:     "bridges that a link of the host is a port of",
	setForeign:      "bridges of other container networks",
	setSources:      "subnets that are masqueraded",
	setHome:         "subnets, with their bridge",
	mapSNAT:         "subnets with a chosen source address",
	mapPublished:    "host ports on all addresses, and where they lead",
	mapPublishedAt:  "host ports on one address",
	mapRanges:       "ranges of host ports on all addresses that keep their numbers",
	mapRangesAt:     "... on one address",
	setDirect:       "containers' ports that are reached by the container's address",
	setDirectRanges: "ranges of them",
}

// chainsText shows the chains that keep says.
func (t table) chainsText(keep func(chain) bool) string {
	var b strings.Builder
	for _, c := range t.chains {
		if !keep(c) {
			continue
		}
		fmt.Fprintf(&b, "chain %s {\n", c.name)
		if c.text != "" {
			fmt.Fprintf(&b, "\t%s\n", c.text)
		}
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t%s\n", r.text)
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// shownElsewhere says whether a chain of IPv6 is that of IPv4 in other words.
func shownElsewhere(c chain) bool {
	return slices.ContainsFunc(newTable(false).chains, func(other chain) bool {
		if other.name != c.name || len(other.rules) != len(c.rules) {
			return false
		}
		for i := range c.rules {
			if strings.ReplaceAll(other.rules[i].text, "ip ", "ip6 ") != c.rules[i].text {
				return false
			}
		}
		return true
	})
}

// elementsText shows all sets of an example that are not empty.
func (e example) elementsText() string {
	var b strings.Builder
	for _, v6 := range []bool{false, true} {
		t := newTable(v6)
		if v6 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "table %s %s\n", t.keyword, TableName)
		for name, have := range rulesetOf(e, v6).ordered() {
			if list := t.elementTexts(name, have); len(list) > 0 {
				fmt.Fprintf(&b, "\t%s { %s }\n", name, strings.Join(list, ", "))
			}
		}
	}
	return b.String()
}

func document(t *testing.T) string {
	t.Helper()
	type set struct{ Name, About string }
	type section struct{ Name, About, Elements string }
	data := struct {
		Mark, Comment, Chains4, Chains6 string
		Sets                            []set
		Examples                        []section
	}{
		Mark: fmt.Sprintf("%#x", Mark), Comment: ruleComment,
		Chains4: newTable(false).chainsText(func(chain) bool { return true }),
		Chains6: newTable(true).chainsText(func(c chain) bool { return !shownElsewhere(c) }),
	}
	for _, name := range setNames() {
		assert.Assert(t, aboutSets[name] != "", "set %s is not explained", name)
		data.Sets = append(data.Sets, set{string(name), aboutSets[name]})
	}
	all := examples()
	for _, name := range documented {
		data.Examples = append(data.Examples, section{name, all[name].about, all[name].elementsText()})
	}
	for name, e := range all {
		assert.Equal(t, e.about != "", slices.Contains(documented, name), "example %s", name)
	}
	text, err := template.ParseFiles("testdata/firewall.md.tmpl")
	assert.NilError(t, err)
	var b bytes.Buffer
	assert.NilError(t, text.Execute(&b, data))
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// docs/firewall.md shows the rules as they are.
func TestDocument(t *testing.T) {
	want := document(t)
	if golden.FlagUpdate() {
		assert.NilError(t, os.WriteFile(documentFile, []byte(want), 0o644))
	}
	got, err := os.ReadFile(documentFile)
	assert.NilError(t, err)
	assert.Equal(t, string(got), want, "run go test ./netplugin/firewall -run TestDocument -update")
}
