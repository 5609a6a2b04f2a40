package archive

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// An s3 store is what is below a prefix in a bucket.
type s3 struct {
	client *minio.Client
	bucket string
	prefix string // "" or with a / at its end
	region string
}

// Variables of a target's environment.
const (
	keyVariable     = "AWS_ACCESS_KEY_ID"
	secretVariable  = "AWS_SECRET_ACCESS_KEY"
	sessionVariable = "AWS_SESSION_TOKEN"
	regionVariable  = "AWS_DEFAULT_REGION"
)

// newS3 reads the repository in restic's form: s3:https://HOST[:PORT]/BUCKET/PREFIX,
// s3:HOST/BUCKET/PREFIX or s3://HOST/BUCKET. Errors are invalid.
func newS3(t backup.Target) (*s3, error) {
	wrong := func(why string) (*s3, error) {
		return nil, fault.Invalid("target %s: repository %.200q: %s: want s3:https://HOST[:PORT]/BUCKET/PREFIX", t.Name, backup.Redact(t.Repository), why)
	}
	place := strings.TrimPrefix(t.Repository, "s3:")
	if !strings.Contains(place, "://") {
		place = "https://" + strings.TrimPrefix(place, "//")
	}
	u, err := url.Parse(place)
	switch {
	case err != nil:
		return wrong("is not a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return wrong("has an unknown scheme")
	case u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return wrong("has no host, or a part that is not used")
	case u.User != nil:
		return wrong("has a user: the keys belong into " + keyVariable + " and " + secretVariable)
	}
	bucket, prefix, _ := strings.Cut(strings.Trim(u.Path, "/"), "/")
	if bucket == "" {
		return wrong("has no bucket")
	}
	if prefix != "" {
		prefix += "/"
	}
	for _, variable := range []string{keyVariable, secretVariable} {
		if t.Environment[variable] == "" {
			return nil, fault.Invalid("target %s: an S3 repository needs the variables %s and %s", t.Name, keyVariable, secretVariable)
		}
	}
	transport, err := transportOf(t, u.Scheme == "https")
	if err != nil {
		return nil, err
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds:  credentials.NewStaticV4(t.Environment[keyVariable], t.Environment[secretVariable], t.Environment[sessionVariable]),
		Secure: u.Scheme == "https", Region: t.Environment[regionVariable], Transport: transport,
	})
	if err != nil {
		return wrong(err.Error())
	}
	return &s3{client: client, bucket: bucket, prefix: prefix, region: t.Environment[regionVariable]}, nil
}

// transportOf trusts the authorities that the target names, or those of the machine.
func transportOf(t backup.Target, secure bool) (*http.Transport, error) {
	transport, err := minio.DefaultTransport(secure)
	if err != nil {
		return nil, err
	}
	if authorities := t.Authorities(); authorities != "" && secure {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(authorities)) {
			return nil, fault.Invalid("target %s: %s: want certificates in PEM", t.Name, backup.CACert)
		}
		if transport.TLSClientConfig == nil {
			transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		transport.TLSClientConfig.RootCAs = pool
	}
	return transport, nil
}

func (s *s3) String() string {
	return fmt.Sprintf("bucket %s at %s, prefix %q", s.bucket, s.client.EndpointURL().Host, s.prefix)
}

// failed gives an error the meaning that package fs has words for.
func failed(err error) error {
	if err == nil {
		return nil
	}
	switch minio.ToErrorResponse(err).Code {
	case minio.NoSuchKey, minio.NoSuchBucket:
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func (s *s3) make(ctx context.Context) error {
	there, err := s.client.BucketExists(ctx, s.bucket)
	if err != nil || there {
		return failed(err)
	}
	err = s.client.MakeBucket(ctx, s.bucket, minio.MakeBucketOptions{Region: s.region})
	if minio.ToErrorResponse(err).Code == minio.BucketAlreadyOwnedByYou {
		return nil // another host was faster
	}
	return failed(err)
}

func (s *s3) list(ctx context.Context, volume string) ([]object, error) {
	// It ends the goroutine behind the channel when this returns early.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	prefix := s.prefix
	if volume != "" {
		prefix += volume + "/"
	}
	var all []object
	for info := range s.client.ListObjects(ctx, s.bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true}) {
		if info.Err != nil {
			return nil, failed(info.Err)
		}
		volume, file, ok := strings.Cut(strings.TrimPrefix(info.Key, s.prefix), "/")
		if ok && !strings.Contains(file, "/") {
			all = append(all, object{volume: volume, file: file, size: info.Size, modified: info.LastModified})
		}
	}
	return all, ctx.Err()
}

func (s *s3) open(ctx context.Context, name string) (io.ReadCloser, error) {
	o, err := s.client.GetObject(ctx, s.bucket, s.prefix+name, minio.GetObjectOptions{})
	if err != nil {
		return nil, failed(err)
	}
	// The first request comes with the first call of this kind.
	if _, err := o.Stat(); err != nil {
		_ = o.Close()
		return nil, failed(err)
	}
	return o, nil
}

const (
	// minPart is the size of the parts of an upload in bytes; one is kept in memory.
	minPart = 16 << 20
	// maxParts is somewhat less than what S3 allows, because a compressed archive can be
	// larger than what is in it.
	maxParts = 9000
)

func (s *s3) put(ctx context.Context, name string, about int64, r io.Reader) error {
	options := minio.PutObjectOptions{
		ContentType: "application/octet-stream", PartSize: uint64(max((about/maxParts>>20+1)<<20, minPart)),
		// A sum of each part, in the form that every server knows. Over HTTPS the content is not
		// signed anyway.
		SendContentMd5: true, DisableContentSha256: true,
	}
	size := int64(-1)
	if whole, ok := r.(interface{ Len() int }); ok {
		size = int64(whole.Len()) // one request instead of three
	} else {
		r = reading{r}
	}
	_, err := s.client.PutObject(ctx, s.bucket, s.prefix+name, r, size, options)
	return failed(err)
}

// reading keeps an error of what is read from being taken for its end.
type reading struct{ r io.Reader }

// Read implements io.Reader.
func (r reading) Read(buf []byte) (int, error) {
	n, err := r.r.Read(buf)
	if err != nil && err != io.EOF { //nolint:errorlint // the end is never wrapped
		err = fmt.Errorf("read: %w", err)
	}
	return n, err
}

func (s *s3) remove(ctx context.Context, name string) error {
	return failed(s.client.RemoveObject(ctx, s.bucket, s.prefix+name, minio.RemoveObjectOptions{}))
}

func (s *s3) sweep(ctx context.Context, before time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	core := minio.Core{Client: s.client}
	for upload := range s.client.ListIncompleteUploads(ctx, s.bucket, s.prefix, true) {
		err := upload.Err
		if err == nil && upload.Initiated.Before(before) {
			// Not all of that name: one may have begun just now.
			err = core.AbortMultipartUpload(ctx, s.bucket, upload.Key, upload.UploadID)
		}
		// Another host may be sweeping, and some servers say so of a bucket without uploads.
		if err != nil && minio.ToErrorResponse(err).Code != minio.NoSuchUpload {
			return failed(err)
		}
	}
	return ctx.Err()
}
